"""One simulated run of a cluster, as a question and its answer: what the cluster suites have in common."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from scheduler.cluster.cost.model import Kernel
from scheduler.cluster.cost.profile import Slo
from scheduler.sim.ablations.named_policies import named
from scheduler.sim.outcome import in_time_by_second
from scheduler.sim.replay import Hardware, Replay, Workload, fitted, replay
from scheduler.sim.true_costs import Deviation
from scheduler.sim.workload.adapters import catalogue, rank_mix
from scheduler.sim.workload.lengths import length_law, with_lengths
from scheduler.sim.workload.popularity import over, popularity
from scheduler.sim.workload.rates import Pacing, process_cv, rate_curve
from scheduler.sim.workload.sessions import SessionOptions, in_sessions
from scheduler.sim.workload.trace import Call, poisson, read_trace
from scripts.figures.fault_plans import fault_plan
from scripts.figures.roofline import L40S, LLAMA_8B, derived
from scripts.figures.rows import SuiteRows
from scripts.results import Row

SLO = Slo(ttft_s=2.0, tbt_s=0.1)
PROFILE = derived(LLAMA_8B, L40S, SLO)
GIB = 2**30

Traces = Mapping[str, Sequence[Call]]


@dataclass(frozen=True, slots=True)
class ClusterRun:
    """A run of `policy` on `nodes` nodes with `memory_gib` beside the base model on each.

    Policies are told one kind of kernels, by the roofline's profile. Nodes run `true_kernel` (empty: the same),
    off by factors of spread `sigma` and a pace that drifts by up to `drift`. For `seconds` requests come at `rate`
    a second times what the `curve` says, of which `warm_s` do not count. Before them come `lead_s` of silence, so
    that policies that copy everything everywhere have done so. When they come within that, and how long they are,
    `arrivals` and `lengths` say, by the trace or without it. Whose they are and what prompts have in common is as
    in `SessionOptions`.
    """

    policy: str
    kernel: str = "padded"
    trace: str = "conv"
    ranks: str = "equal"
    law: str = "power:0.3"
    adapters: int = 100
    nodes: int = 4
    memory_gib: float = 27.0
    rate: float = 10.0
    seconds: float = 120.0
    warm_s: float = 15.0
    lead_s: float = 30.0
    seed: int = 0
    arrivals: str = "trace"
    curve: str = "steady"
    lengths: str = "trace"
    tenants: int = 0
    turns: float = 1.0
    system_tokens: int = 0
    background: float = 0.0
    true_kernel: str = ""
    sigma: float = 0.1
    drift: float = 0.1
    faults: str = ""


def read_traces(folder: Path | None) -> Traces:
    """Read the two Azure traces of `folder`; draw stand-ins of like lengths if there is no folder."""
    if folder is None:
        rng = np.random.default_rng(0)
        return {"conv": poisson(20.0, 60.0, (1155, 40), rng), "code": poisson(20.0, 60.0, (2048, 28), rng)}
    return {
        name: read_trace((folder / f"azure_llm_2023_{name}.csv").read_text()) for name in ("conv", "code")
    }


def traffic(run: ClusterRun, traces: Traces) -> Workload:
    """Draw the traffic, the same for every policy and kernel.

    The seed says where in the trace it begins, and which adapters are popular. Chance that one option draws
    changes nothing of what others draw.
    """
    orders, times, lengths, askers = np.random.default_rng(run.seed).spawn(4)
    mix = rank_mix(run.ranks)
    adapters = catalogue(run.adapters, mix)
    order: list[int] = orders.permutation(len(adapters)).tolist()
    shuffled = [adapters[at] for at in order]
    curve = rate_curve(run.curve, run.seconds)
    calls = Pacing(run.rate, run.seconds, process_cv(run.arrivals), curve).calls(traces[run.trace], times)
    calls = with_lengths(calls, length_law(run.lengths), lengths)
    options = SessionOptions(
        run.tenants, run.turns, system_tokens=run.system_tokens, background=run.background
    )
    drawn = in_sessions(calls, shuffled, over(popularity(run.law), mix), options, askers)
    arrivals = [replace(each, call=each.call.at(run.lead_s + each.call.arrival_s)) for each in drawn]
    faults = fault_plan(run.faults, run.nodes, run.lead_s, run.lead_s + run.seconds, run.seed)
    return Workload(arrivals, adapters, run.lead_s + run.seconds, run.lead_s + run.warm_s, faults)


def hardware(run: ClusterRun, offered: Workload) -> Hardware:
    """Make nodes whose operating points are for this traffic's mean request."""
    model = PROFILE.model(Kernel(run.true_kernel)) if run.true_kernel else None
    deviation = Deviation(run.seed, run.sigma, run.drift, model)
    made = Hardware(PROFILE, Kernel(run.kernel), int(run.memory_gib * GIB), deviation=deviation)
    return fitted(made, offered)


def simulate(run: ClusterRun, traces: Traces) -> Replay:
    """Simulate it."""
    offered = traffic(run, traces)
    return replay(named(run.policy), run.nodes, hardware(run, offered), offered, run.seed)


def answer(run: ClusterRun, traces: Traces) -> Row:
    """Simulate a run and give its figures as a row's answer."""
    done = simulate(run, traces)
    last, outcome = done.last, done.outcome
    return {
        "requests": outcome.requests,
        "refused": outcome.refused,
        "ttft_p50_s": round(outcome.ttft_p50_s, 4),
        "ttft_p95_s": round(outcome.ttft_p95_s, 4),
        "tbt_p50_s": round(outcome.tbt_p50_s, 5),
        "tbt_p95_s": round(outcome.tbt_p95_s, 5),
        "gap_p99_s": round(outcome.gap_p99_s, 5),
        "goodput": round(outcome.goodput, 3),
        "in_time": round(outcome.in_time, 4),
        "worst_tenant": None if outcome.worst_tenant is None else round(outcome.worst_tenant, 4),
        "promises": [outcome.promises_kept, outcome.promises_broken],
        "in_time_by_s": _by_second(run, done),
        "counted_s": done.counted_s,
        "meets": outcome.meets(SLO),
        "pulls": last.pulls,
        "moved_gib": round(last.moved_bytes / GIB, 3),
        "kept_gib_per_node": round(last.kept_bytes / GIB / run.nodes, 3),
        "used_gib_per_node": round(last.used_bytes / GIB / run.nodes, 3),
    }


def _by_second(run: ClusterRun, done: Replay) -> list[float | None]:
    """List the part in time of what came in each second after the silence."""
    parts = in_time_by_second(done.records, SLO, run.lead_s + run.seconds)[int(run.lead_s) :]
    return [None if part is None else round(part, 3) for part in parts]


def everything_gib(run: ClusterRun) -> float:
    """Compute the size of all adapters: what each node would hold if every one were everywhere."""
    return sum(ref.nbytes for ref in catalogue(run.adapters, rank_mix(run.ranks))) / GIB


def ask(rows: SuiteRows, run: ClusterRun, traces: Traces) -> Row:
    """Find the row of a run, or simulate it."""
    return rows.ask(asdict(run), lambda: answer(run, traces))
