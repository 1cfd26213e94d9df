"""Who asks for what, when: calls that name their adapters."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lora.adapter import AdapterRef
from scheduler.sim.workload.adapters import RankMix
from scheduler.sim.workload.popularity import Popularity, Shifting, chosen
from scheduler.sim.workload.trace import Call


@dataclass(frozen=True, slots=True)
class Arrival:
    """A call that names its adapter."""

    name: str
    call: Call
    adapter: AdapterRef


def assigned(
    calls: Sequence[Call], adapters: Sequence[AdapterRef], law: Popularity, rng: np.random.Generator
) -> tuple[Arrival, ...]:
    """Give each call an adapter drawn by `law`; the run lasts from 0 s to the last call."""
    times = np.array([call.arrival_s for call in calls])
    ranks = np.array([ref.rank for ref in adapters])
    indices = chosen(law, ranks, times / max(float(times.max(initial=0.0)), 1e-9), rng).tolist()
    return tuple(
        Arrival(f"r{at}", call, adapters[index])
        for at, (call, index) in enumerate(zip(calls, indices, strict=True))
    )


def over(law: Popularity, mix: RankMix) -> Popularity:
    """Return `law`, with the hot rank moving where the mix of ranks says so."""
    return Shifting(law) if mix.shifts else law
