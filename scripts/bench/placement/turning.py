"""Popularity that turns: who is asked for most changes at once, several times in a run."""

from dataclasses import dataclass

import numpy as np

from scheduler.sim.workload.popularity import Floats, Ints, Popularity


@dataclass(frozen=True, slots=True)
class Turning:
    """`law` over an order of the adapters that is turned on by a part of its length, `turns` times in the run.

    With three turns the most popular adapter of the first third is in the middle of the order in the second, or so.
    """

    law: Popularity
    turns: int

    def weights(self, ranks: Ints, at: float) -> Floats:
        """Turn what `law` says of the beginning."""
        step = int(at * self.turns) * len(ranks) // self.turns
        return np.roll(self.law.weights(ranks, 0.0), step)
