"""First fit: bin packing by utilisation and memory that does not know that ranks disturb each other."""

import numpy as np

from scheduler.cluster.placement.base import Problem
from scheduler.cluster.placement.room import Room
from scheduler.cluster.state import Placement


class FirstFitPlacement:
    """Each adapter, in order, whole on the first node with memory for it that stays within `target`
    utilisation; the least loaded one with memory where none does."""

    def __init__(self, target: float = 1.0) -> None:
        self._target = target

    def place(self, problem: Problem) -> Placement:
        """One pass over the adapters in order of registration."""
        room = Room(problem)
        for ref, rate in problem.demand.tokens_per_s.items():
            added = np.array([rate / state.sustains(ref.rank) for state in problem.nodes])
            with_memory = np.flatnonzero(room.free_bytes >= ref.nbytes)
            if not len(with_memory):
                continue
            after = (room.load + added)[with_memory]
            fitting = np.flatnonzero(after <= self._target)
            node = int(with_memory[fitting[0] if len(fitting) else np.argmin(after)])
            room.take(ref, node, 1.0, float(added[node]))
        return room.placement()
