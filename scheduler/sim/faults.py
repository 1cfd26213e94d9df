"""What goes wrong with nodes, and when: drawn beforehand, so that a seed names a whole history."""

from dataclasses import dataclass
from enum import Enum

import numpy as np


class FaultKind(Enum):
    """CRASH: nodes die at once and start anew, empty, when it is over. PARTITION: nodes reach only each
    other. SLOW: their steps take `factor` times as long. LEAVE: they ask to go. COORDINATOR: it dies, and a
    new one that knows only the registry takes its place when it is over."""

    CRASH = "crash"
    PARTITION = "partition"
    SLOW = "slow"
    LEAVE = "leave"
    COORDINATOR = "coordinator"


@dataclass(frozen=True, slots=True)
class Fault:
    """From `start_s` on, for `lasts_s`."""

    kind: FaultKind
    start_s: float
    lasts_s: float
    nodes: tuple[str, ...] = ()
    factor: float = 1.0


def draw_faults(
    count: int, seconds: float, nodes: tuple[str, ...], rng: np.random.Generator
) -> tuple[Fault, ...]:
    """`count` faults within `seconds`, in order of time: crashes, partitions, slow nodes and dead
    coordinators, each of up to a third of the nodes and a sixth of the time."""
    kinds = (FaultKind.CRASH, FaultKind.CRASH, FaultKind.PARTITION, FaultKind.SLOW, FaultKind.COORDINATOR)
    drawn: list[Fault] = []
    for start_s in np.sort(rng.random(count) * seconds).tolist():
        kind = kinds[int(rng.integers(len(kinds)))]
        struck = rng.permutation(len(nodes))[: int(rng.integers(1, max(2, len(nodes) // 3 + 1)))]
        names = tuple(nodes[at] for at in sorted(struck.tolist()))
        lasts_s = float(rng.uniform(0.5, max(1.0, seconds / 6)))
        drawn.append(Fault(kind, start_s, lasts_s, names, factor=float(rng.uniform(1.5, 4.0))))
    return tuple(drawn)
