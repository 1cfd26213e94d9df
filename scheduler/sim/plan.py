"""The capacity planner: how many nodes a workload needs to meet its SLO, found by simulating it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scheduler.cluster.profile import Slo
from scheduler.cluster.state import OperatingPoints
from scheduler.sim.outcome import Outcome
from scheduler.sim.workload import Arrival


@dataclass(frozen=True, slots=True)
class Trial:
    """What so many nodes would do, and whether that is within the SLO."""

    nodes: int
    outcome: Outcome
    enough: bool


def least_nodes(arrivals: Sequence[Arrival], points: OperatingPoints, seconds: float) -> int:
    """Whole nodes that the work fills however it is placed: Σ tokens / OP[rank] over the time. A start, not a
    bound."""
    work = (
        (each.call.prompt_tokens + each.call.output_tokens) / points.at(each.adapter.rank)
        for each in arrivals
    )
    return max(1, int(sum(work) / seconds))


def trials(simulate: Callable[[int], Outcome], slo: Slo, least: int, most: int) -> list[Trial]:
    """Simulate numbers of nodes from `least` to `most` until the fewest that are enough are known: doubling,
    then halving the interval, which takes it that more nodes are never worse. In order of trial; none is
    enough if even `most` are not.

    Enough means that every request was served, and P95 of the time to first token and of the mean time
    between tokens are within `slo`.
    """
    made: dict[int, Trial] = {}

    def enough(nodes: int) -> bool:
        outcome = simulate(nodes)
        good = outcome.ttft_p95_s <= slo.ttft_s and outcome.tbt_p95_s <= slo.tbt_s
        made[nodes] = Trial(nodes, outcome, good and outcome.served == outcome.requests)
        return made[nodes].enough

    short, tried = least - 1, min(least, most)
    while not enough(tried):
        if tried == most:
            return list(made.values())
        short, tried = tried, min(2 * tried, most)
    while tried - short > 1:
        middle = (short + tried) // 2
        if enough(middle):
            tried = middle
        else:
            short = middle
    return list(made.values())


def fewest(made: Sequence[Trial]) -> int | None:
    """The fewest nodes that are enough, None if no number that was tried is."""
    return min((trial.nodes for trial in made if trial.enough), default=None)
