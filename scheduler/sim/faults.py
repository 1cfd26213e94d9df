"""What goes wrong with messages and with nodes, and when: drawn beforehand, so that a seed names a history."""

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True, slots=True)
class NetworkFaults:
    """Chances, for each posted message, of loss, of a double, and of a delay of up to `late_s`."""

    loss: float = 0.0
    double: float = 0.0
    late: float = 0.0
    late_s: float = 3.0


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
