"""Everything everywhere, as far as memory goes: what balances load best where neither bytes nor ranks matter."""

import numpy as np

from scheduler.cluster.placement.base import Problem
from scheduler.cluster.placement.room import Room
from scheduler.cluster.state import Placement


class ReplicatedPlacement:
    """One copy of each adapter on the node with most memory left, then copies on all other nodes in order of
    registration while there is memory; equal shares."""

    def place(self, problem: Problem) -> Placement:
        """Looks at no demand, so that it only changes when nodes or adapters do."""
        room = Room(problem)
        refs = list(problem.demand.tokens_per_s)
        for ref in refs:
            node = int(np.argmax(room.free_bytes))
            if room.fits(ref, node):
                room.take(ref, node, 1.0, 0.0)
        for ref in refs:
            first = room.holders(ref)
            for node in np.flatnonzero(room.free_bytes >= ref.nbytes).tolist() if first else ():
                if node not in first:
                    room.take(ref, node, 1.0, 0.0)
        return room.placement()
