"""What policies can carry, side by side: the runs that two figures are drawn from.

On each workload, under each kind of kernels and with each of five seeds, the highest rate of a ladder at which P95
of both times is within the SLO is searched for: up from where the seed before ended while it holds, else down. For
the first seed of some workloads the whole ladder is climbed, for curves over the rate.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from tqdm import tqdm

from scheduler.sim.ablations.named_policies import BASELINES
from scripts.figures.rows import Row
from scripts.figures.stage import Case, ask
from scripts.figures.suite import Work

POLICIES = ("ours", *BASELINES)
RATES = (5.0, 6.0, 7.0, 8.5, 10.0, 12.0, 14.0, 17.0, 20.0, 24.0, 29.0, 35.0, 42.0)
CLIMBED = RATES[2:11:2]
START = RATES.index(17.0)
SLOW_START = RATES.index(5.0)  # of the policy that the other rates would break
SEEDS = range(5)


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked for, and by which kernels it is served."""

    name: str
    kernel: str
    trace: str = "conv"
    ranks: str = "equal"
    law: str = "power:0.3"
    climbed: bool = False

    def case(self, policy: str, rate: float, seed: int) -> Case:
        """One run of it."""
        return Case(policy, self.kernel, self.trace, self.ranks, self.law, rate=rate, seed=seed)


WORKLOADS = (
    Workload("conversations, equal ranks, padded", "padded", climbed=True),
    Workload("conversations, skewed ranks, padded", "padded", ranks="skewed"),
    Workload("conversations, equal ranks, exact", "exact"),
    Workload("skewed ranks, sharp popularity, padded", "padded", ranks="skewed", law="power:0.1"),
    Workload("conversations, shifting ranks, padded", "padded", ranks="shifting"),
    Workload("code, equal ranks, padded", "padded", trace="code"),
)
FIRST = WORKLOADS[:3]


def ask_all(work: Work) -> None:
    """Seed by seed, so that an interrupted suite has few seeds of the same workloads."""
    if work.quick:
        for policy in ("ours", "paper"):
            for rate in (8.0, 12.0):
                case = replace(WORKLOADS[0].case(policy, rate, 0), seconds=8.0, warm_s=4.0, adapters=10)
                ask(work.rows, case, work.traces)
        return
    rest = [load for load in WORKLOADS if load not in FIRST]
    searched = [
        (seed, load, policy)
        for loads in (FIRST, rest)
        for seed in SEEDS
        for load in loads
        for policy in POLICIES
    ]
    reached = {(load.name, "first-fit"): SLOW_START for load in WORKLOADS}
    for seed, load, policy in tqdm(searched, unit="search"):
        start = reached.get((load.name, policy), START)
        reached[load.name, policy] = _highest(work, load, policy, seed, start)
        if seed == 0 and load.climbed:
            for rate in CLIMBED:
                ask(work.rows, load.case(policy, rate, seed), work.traces)


def _highest(work: Work, load: Workload, policy: str, seed: int, start: int) -> int:
    """The index of the highest rate within the SLO, -1 if there is none."""

    def meets(at: int) -> bool:
        return bool(ask(work.rows, load.case(policy, RATES[at], seed), work.traces)["meets"])

    at = max(start, 0)
    if not meets(at):
        while at >= 0 and not meets(at):
            at -= 1
        return at
    while at + 1 < len(RATES) and meets(at + 1):
        at += 1
    return at


def of(rows: Sequence[Row], load: Workload, policy: str, seed: int) -> list[Row]:
    """The runs of one search, by rate."""
    mine = (policy, load.kernel, load.trace, load.ranks, load.law, seed)
    found = [
        row
        for row in rows
        if tuple(row["asked"][key] for key in ("policy", "kernel", "trace", "ranks", "law", "seed")) == mine
    ]
    return sorted(found, key=lambda row: row["asked"]["rate"])


def throughput(rows: Sequence[Row]) -> float | None:
    """Requests/s of the highest rate within the SLO; 0 if none is, None without runs."""
    return max((row["asked"]["rate"] for row in rows if row["meets"]), default=0.0) if rows else None


def present(rows: Sequence[Row]) -> Iterator[Workload]:
    """The workloads that there are runs of."""
    return (load for load in WORKLOADS if any(of(rows, load, "ours", seed) for seed in SEEDS))


def throughputs(rows: Sequence[Row], load: Workload) -> Mapping[str, Sequence[float]]:
    """Of every policy, a value for each seed that there are runs of."""
    found = {policy: [throughput(of(rows, load, policy, seed)) for seed in SEEDS] for policy in POLICIES}
    return {policy: [each for each in values if each is not None] for policy, values in found.items()}
