"""Learn online what steps cost on a node: by which kind of kernel, and how far from its profile.

Each kind of kernel is a hypothesis, under which a pace is fitted (see `PaceFits`). The kind whose predictions
were best of late is believed, but none is believed in place of another for a gain that chance explains. Knows no
clock: seconds come in, and the same ones give the same answer.
"""

import math
from collections.abc import Sequence

import numpy as np

from scheduler.cluster.cost.model import CostModel, Kernel, StepLoad, by_kernel
from scheduler.cluster.cost.pace import Pace
from scheduler.cluster.cost.pace_fit import PaceFits
from scheduler.cluster.cost.step_tally import Floats, StepParts, Tally

_BATCH = 8  # steps that are learnt from together
_TRUSTED = 0.9  # of a pace, after each rest
_MEMORY = 400.0  # steps after which errors are forgotten but for 1/e
_NOISE = 1e-4  # squared relative error that is no reason to prefer a kernel
_BETTER, _EVIDENCE = 1.03, 12.0  # over n steps squared errors must fall by the factor 1.03 + 12 / n


class LearntCost:
    """What steps turn out to cost on one node, in bounded memory and microseconds a step.

    `models` are the profile's, first that of the kernel that the node is said to have; of kernels that it lacks
    see `by_kernel`.
    """

    def __init__(self, models: Sequence[CostModel]) -> None:
        known = by_kernel(models)
        self._kernels = tuple(known)
        self._parts, self._fits = StepParts(tuple(known.values())), PaceFits(len(known))
        self._waiting: list[tuple[Tally, float]] = []
        self._believed = 0
        self._steps = 0.0  # that the sums below are of, as far as they are not forgotten
        self._errors: Floats = np.zeros(len(known))
        self._mix: Floats = np.zeros((len(known), 3))
        self._pace, self._trust = Pace(), 1.0

    @property
    def kernel(self) -> Kernel:
        """Return the kind of kernel that explains the steps best."""
        return self._kernels[self._believed]

    @property
    def pace(self) -> Pace:
        """Return the factors on what the profile says of steps under `kernel`."""
        trust, pace = self._trust, self._pace
        return Pace(pace.fixed**trust, pace.prompt**trust, pace.lora**trust)

    @property
    def slowdown(self) -> float:
        """Return how many times longer the steps of late take than the profile said of the kernel it named."""
        told = float(self._mix[0].sum())
        if not told:
            return 1.0
        fixed, prompt, lora = self._mix[self._believed].tolist()
        pace = self.pace
        return (fixed * pace.fixed + prompt * pace.prompt + lora * pace.lora) / told

    def observe(self, load: StepLoad, seconds: float) -> None:
        """Learn that a step took `seconds`. Most steps are only counted, and learnt from with later ones."""
        if not (load.adapters and 0 < seconds < math.inf):
            return
        self._waiting.append((self._parts.tally(load), seconds))
        if len(self._waiting) >= _BATCH:
            self._learn()

    def rest(self) -> None:
        """Doubt the pace a little, since no step ran for a while.

        A node that is believed slow gets no work, and would never show that it is not slow any more.
        """
        self._trust *= _TRUSTED

    def _learn(self) -> None:
        tallies, seconds = zip(*self._waiting, strict=True)
        self._waiting.clear()
        parts = self._parts.of(tallies)
        costly = (parts.sum(2) > 0).all(0)  # of what is told to take no time there are no factors
        parts, count = parts[:, costly], int(costly.sum())
        if not count:
            return
        kept = math.exp(-count / _MEMORY)
        errors = self._fits.learn(parts, np.array(seconds)[costly])
        self._steps = self._steps * kept + count
        self._mix = self._mix * kept + parts.sum(1)
        self._errors = self._errors * kept + errors.sum(1)
        self._choose()
        self._pace, self._trust = self._fits.pace(self._believed), 1.0

    def _choose(self) -> None:
        """Believe the kind of least error if its errors are less than chance explains.

        Where errors are normal, n/2 · log of the ratio of their squares says how much likelier one kind is: it is
        the logarithm of the likelihood ratio.
        """
        best = int(np.argmin(self._errors))
        least = float(self._errors[best]) + _NOISE * self._steps
        now = float(self._errors[self._believed]) + _NOISE * self._steps
        if now > least * (_BETTER + _EVIDENCE / self._steps):
            self._believed = best
