"""The capacity planner: how many nodes a workload needs to meet its SLO under each policy, found by simulating
it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from scheduler.cluster.cost.profile import Slo
from scheduler.cluster.policies import Policy
from scheduler.cluster.state import OperatingPoints
from scheduler.sim.outcome import Record
from scheduler.sim.replay import GiveUp, Hardware, Replay, Workload, replay
from scheduler.sim.workload.trace import Arrival

_LATE = 0.06  # of the requests: more than the 5 % that may be late, so that P95 is beyond doubt
_EVERY_S = 5  # virtual seconds: how often that is looked at

Watch = Callable[[str, int, float], None]
"""(policy, nodes, part of the run that is done), called as a simulation goes on."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What so many nodes would do, and whether that is within the SLO."""

    nodes: int
    replay: Replay
    enough: bool


@dataclass(frozen=True, slots=True)
class Need:
    """A policy and the numbers of nodes that were tried with it, ascending."""

    policy: Policy
    trials: tuple[Trial, ...]

    @property
    def fewest(self) -> Trial | None:
        """Return the trial with the fewest nodes that are enough, None if no number that was tried is."""
        return next((trial for trial in self.trials if trial.enough), None)

    @property
    def best(self) -> Trial:
        """Return the fewest that are enough, else the most that were tried."""
        return self.fewest or self.trials[-1]


@dataclass(frozen=True, slots=True)
class PlanQuestion:
    """Which nodes, which traffic, the hours that it lasts in all, at most how many nodes, and the seed of all
    chance. Nodes must be enough for each of `further` too, which have the seeds that follow."""

    hardware: Hardware
    traffic: Workload
    hours: float
    most: int
    seed: int
    further: tuple[Workload, ...] = ()

    @property
    def slo(self) -> Slo:
        """Return what is to be met."""
        return self.hardware.profile.slo


def needed(question: PlanQuestion, policy: Policy, watch: Watch) -> Need:
    """Find the fewest nodes that are enough under `policy`."""

    traffic, slo = question.traffic, question.slo

    def simulate_seed(nodes: int, at: int, traffic: Workload) -> Replay:
        allowed = _LATE * sum(each.call.arrival_s >= traffic.warm_s for each in traffic.arrivals)

        def look(at_s: float, records: Mapping[str, Record]) -> None:
            watch(policy.name, nodes, min(1.0, at_s / traffic.seconds))
            if int(at_s) % _EVERY_S == 0 and _late(records, slo, traffic.warm_s, at_s) > allowed:
                raise GiveUp

        return replay(policy, nodes, question.hardware, traffic, question.seed + at, look)

    def simulate(nodes: int) -> Replay:
        return worst(slo, (simulate_seed(nodes, *each) for each in enumerate((traffic, *question.further))))

    points = question.hardware.node(policy.residency).machine.operating_points
    first = likely_nodes(traffic.arrivals, points, traffic.seconds)
    made = trials(simulate, slo, min(first, question.most), question.most)
    return Need(policy, tuple(sorted(made, key=lambda trial: trial.nodes)))


def likely_nodes(arrivals: Sequence[Arrival], points: OperatingPoints, seconds: float) -> int:
    """Count the nodes that the work fills if it is placed well: Σ tokens / OP[rank] over the time, rounded
    up.

    It is a start, not a bound.
    """
    work = (
        (each.call.prompt_tokens + each.call.output_tokens) / points.at(each.adapter.rank)
        for each in arrivals
    )
    return max(1, ceil(sum(work) / seconds))


def trials(simulate: Callable[[int], Replay], slo: Slo, first: int, most: int) -> list[Trial]:
    """Simulate numbers of nodes, `first` and up to `most`, until the fewest that are enough are known:
    doubling, then halving the interval, which takes it that more nodes are never worse. In order of trial;
    none is enough if even `most` are not.
    """
    made: dict[int, Trial] = {}

    def enough(nodes: int) -> bool:
        done = simulate(nodes)
        made[nodes] = Trial(nodes, done, done.finished and done.outcome.meets(slo))
        return made[nodes].enough

    short, tried = 0, first
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


def worst(slo: Slo, runs: Iterable[Replay]) -> Replay:
    """Return the first run that is not within the SLO, and ask for no more; else that with the least in time."""
    found: list[Replay] = []
    for done in runs:
        if not (done.finished and done.outcome.meets(slo)):
            return done
        found.append(done)
    return min(found, key=lambda done: done.outcome.in_time)


def _late(records: Mapping[str, Record], slo: Slo, warm_s: float, now: float) -> int:
    """Count the requests whose first token is late by now, has come late, or will never come."""
    late = 0
    for record in records.values():
        at_s = record.arrival.call.arrival_s
        first_s = now if record.first_s is None else record.first_s
        late += at_s >= warm_s and first_s - at_s > slo.ttft_s
    return late
