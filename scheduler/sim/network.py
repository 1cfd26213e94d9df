"""What carries messages between nodes, clients and the coordinator, and what goes wrong with it.

Reports and commands are posted: they may be lost, doubled, delayed and so reordered. Requests and answers are
calls on a connection: they arrive in order, or their sender learns, a while later, that the connection broke.
A partition stops both.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from scheduler.sim.clock import Action, Clock


@dataclass(frozen=True, slots=True)
class NetworkTimes:
    """How long a message takes, and until its sender knows that a connection broke."""

    latency_s: float = 0.0005
    detect_s: float = 1.0


@dataclass(frozen=True, slots=True)
class NetworkFaults:
    """Chances, for each posted message, of loss, of a double, and of a delay of up to `late_s`."""

    loss: float = 0.0
    double: float = 0.0
    late: float = 0.0
    late_s: float = 3.0


class Network:
    """Between parties known by name. `is_up` says who is alive; `cut_off` names those that a partition cut off,
    which reach each other and nobody else."""

    def __init__(
        self, clock: Clock, times: NetworkTimes, faults: NetworkFaults, rng: np.random.Generator
    ) -> None:
        self.times, self.faults = times, faults
        self.cut_off: tuple[str, ...] = ()
        self._clock, self._rng = clock, rng

    def reaches(self, one: str, other: str) -> bool:
        """Return whether no partition is between them."""
        return (one in self.cut_off) == (other in self.cut_off)

    def post(self, sender: str, receiver: str, deliver: Action) -> None:
        """Send on a connection that promises nothing."""
        faults = self.faults
        for copy in range(2):
            odds = self._rng.random(4)
            if (copy == 1 and odds[0] >= faults.double) or odds[1] < faults.loss:
                continue
            late_s = faults.late_s * odds[3] if odds[2] < faults.late else 0.0
            self._clock.after(self.times.latency_s + late_s, self._if_reached(sender, receiver, deliver))

    def call(
        self, ends: tuple[str, str], is_there: Callable[[], bool], deliver: Action, broken: Action
    ) -> None:
        """Send from the first to the second of `ends` on a connection: `deliver` if the second then
        `is_there`, else `broken` once that is known."""

        def arrive() -> None:
            if is_there() and self.reaches(*ends):
                deliver()
            else:
                self._clock.after(self.times.detect_s, broken)

        self._clock.after(self.times.latency_s, arrive)

    def _if_reached(self, sender: str, receiver: str, deliver: Action) -> Action:
        def arrive() -> None:
            if self.reaches(sender, receiver):
                deliver()

        return arrive


@dataclass(frozen=True, slots=True)
class CopySpeeds:
    """Bytes/s between nodes, in and out of each, from the registry to each, and from a host's memory to its card;
    and seconds before the first byte."""

    peer_bytes_per_s: float = 25e9
    registry_bytes_per_s: float = 3e9
    host_bytes_per_s: float = 20e9  # staged through pinned memory
    latency_s: float = 0.002

    def reload_s(self, nbytes: int) -> float:
        """Return how long a copy from a peer takes that waits for no other."""
        return self.latency_s + nbytes / self.peer_bytes_per_s

    def recall_s(self, nbytes: int) -> float:
        """Return how long a copy from the host's memory takes that waits for no other."""
        return self.latency_s + nbytes / self.host_bytes_per_s


class CopyLinks:
    """When transfers end: each node sends one at a time, receives one at a time, and recalls one at a time.

    `moved_bytes` counts what went over the network.
    """

    def __init__(self, clock: Clock, speeds: CopySpeeds) -> None:
        self._clock, self._speeds = clock, speeds
        self._busy: dict[tuple[str, str], float] = {}
        self.moved_bytes = 0

    def transfer(self, source: str | None, target: str, nbytes: int, done: Action) -> None:
        """Move bytes from `source` (None: the registry) to `target`, then `done`."""
        speed = self._speeds.registry_bytes_per_s if source is None else self._speeds.peer_bytes_per_s
        ends = [("in", target), *([("out", source)] if source is not None else [])]
        self.moved_bytes += nbytes
        self._move(ends, nbytes / speed, done)

    def recall(self, node: str, nbytes: int, done: Action) -> None:
        """Move bytes from a node's host memory to its card, then `done`."""
        self._move([("up", node)], nbytes / self._speeds.host_bytes_per_s, done)

    def _move(self, ends: Sequence[tuple[str, str]], seconds: float, done: Action) -> None:
        start = max(self._clock.now, *(self._busy.get(end, 0.0) for end in ends))
        free = start + seconds
        self._busy.update((end, free) for end in ends)
        self._clock.at(free + self._speeds.latency_s, done)
