"""Foretell a live run by the simulator: the same requests and adapters, the profile that the nodes were told."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lora.adapter import AdapterRef
from scheduler.cluster.cost.model import Kernel
from scheduler.cluster.cost.profile import Limits, Profile
from scheduler.sim.ablations.named_policies import named
from scheduler.sim.replay import Hardware, Replay, Workload, fitted, replay
from scheduler.sim.workload.trace import Arrival, Call
from scripts.chaos.questions import Asked

_LEAD_S = 30.0  # in which the first plan is carried out, as before the live run's first request
_PAGE_BYTES = 64 << 10  # of the embedded model's adapters
_TAIL_S = 1.0


@dataclass(frozen=True, slots=True)
class NodeMemory:
    """What each node has for adapters, and for K/V, and what a token of K/V takes."""

    adapter_bytes: int
    kv_bytes: int
    kv_token_bytes: int


def forecast(
    policy: str, nodes: int, profile: Profile, memory: NodeMemory, asked: Sequence[Asked],
    prompt_tokens: int, adapters: Sequence[AdapterRef], seed: int,
) -> Replay:  # fmt: skip
    """Simulate the run under `policy`. Prompts are taken to be of `prompt_tokens` each."""
    by_name = {ref.name: ref for ref in adapters}
    arrivals = [
        Arrival(f"r{at}", Call(_LEAD_S + each.at_s, prompt_tokens, each.tokens), by_name[each.adapter.name])
        for at, each in enumerate(asked)
    ]
    ends_s = max(each.call.arrival_s for each in arrivals) + _TAIL_S
    workload = Workload(arrivals, tuple(adapters), ends_s, _LEAD_S)
    limits = Limits(
        profile.limits.step_prompt_tokens,
        memory.kv_bytes // memory.kv_token_bytes,
        _PAGE_BYTES,
        memory.kv_token_bytes,
    )
    hardware = Hardware(
        replace(profile, limits=limits),
        Kernel.EXACT,
        memory.adapter_bytes + memory.kv_bytes,
        adapter_bytes=memory.adapter_bytes,
    )
    return replay(named(policy), nodes, fitted(hardware, workload), workload, seed)
