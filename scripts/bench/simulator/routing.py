"""Time our routing: microseconds for each decision as a cluster grows, with ten thousand adapters in the table."""

import time
from types import MappingProxyType

import numpy as np

from lora.adapter import AdapterRef
from scheduler.cluster.cost.model import AdapterLoad, Kernel, StepLoad
from scheduler.cluster.cost.profile import Profile
from scheduler.cluster.policies import Setting
from scheduler.cluster.routing.base import NodeLoad, RouteRequest
from scheduler.cluster.state import RoutingTable, Share
from scheduler.sim.ablations.named_policies import named
from scripts.results import Row

_ROUND = 200  # decisions between one telling of loads and the next
_ROOM_BYTES = float(1 << 34)


def time_routing(profile: Profile, refs: tuple[AdapterRef, ...], nodes: int, rounds: int, busy: bool) -> Row:
    """Time the choice of a node, and the note of what was sent there.

    Where nodes are `busy` the adapter's homes are late, so that others are looked at too.
    """
    rng = np.random.default_rng(0)
    names = [f"n{at}" for at in range(nodes)]
    homes: list[list[int]] = rng.integers(nodes, size=(len(refs), 2)).tolist()
    shares = {
        ref: tuple(Share(names[at], 1 / len({*pair})) for at in dict.fromkeys(pair))
        for ref, pair in zip(refs, homes, strict=True)
    }
    table = RoutingTable(1, MappingProxyType(shares))
    policy = named("ours").routing(Setting(profile.model(Kernel.EXACT), profile.slo))
    seconds: list[float] = []
    for _ in range(rounds):
        loads = {name: _load(refs, 30_000 if busy else 0, rng) for name in names}
        asks = [RouteRequest(ref, 500) for ref in _drawn(refs, _ROUND, rng)]
        start_s = time.process_time()
        for ask in asks:
            node = policy.route(ask, table, loads, rng)
            loads[node] = loads[node].plus(ask, 1)
        seconds.append((time.process_time() - start_s) / _ROUND)
    return {"us_per_decision": round(1e6 * float(np.median(seconds)), 2), "decisions": rounds * _ROUND}


def _load(refs: tuple[AdapterRef, ...], queued_tokens: int, rng: np.random.Generator) -> NodeLoad:
    """Make up a node on which twenty sequences decode."""
    running = _drawn(refs, 20, rng)
    parts = (AdapterLoad(ref.rank, queued_tokens // 20, 1) for ref in running)
    digests = frozenset(ref.digest for ref in running)
    return NodeLoad(20, StepLoad(tuple(parts), 24_000), digests, _ROOM_BYTES)


def _drawn(refs: tuple[AdapterRef, ...], count: int, rng: np.random.Generator) -> list[AdapterRef]:
    chosen: list[int] = rng.integers(len(refs), size=count).tolist()
    return [refs[at] for at in chosen]
