"""What a simulated node's steps truly take, which no policy is told.

Policies know a profile. A machine is not as its profile says. Each part of a step's cost is off by a factor of
its own. Its pace drifts as it runs, and it may run other kernels than it was profiled with. All of that is drawn
by seed and by the node's name, so that a node that starts anew is the same machine.
"""

from dataclasses import dataclass
from zlib import crc32

import numpy as np

from scheduler.cluster.cost.model import CostModel, StepLoad

_STEP = 0.1  # of the bound: how far the pace goes in a second, in the mean square


@dataclass(frozen=True, slots=True)
class Deviation:
    """How far nodes are from their profile.

    Factors on the parts of the cost are log-normal of spread `sigma`. The pace walks at random between
    exp(-drift) and exp(drift). `model` is what truly runs there, None for what the profile says.
    """

    seed: int = 0
    sigma: float = 0.0
    drift: float = 0.0
    model: CostModel | None = None

    def __post_init__(self) -> None:
        if self.sigma < 0 or self.drift < 0:
            raise ValueError(f"sigma={self.sigma}, drift={self.drift}: give 0 or more")


AS_PROFILED = Deviation()


class TrueCosts:
    """The costs of one node; times asked for do not go back."""

    def __init__(self, deviation: Deviation, profiled: CostModel, node: str) -> None:
        self._rng = np.random.default_rng([deviation.seed, crc32(node.encode())])
        self._drift = deviation.drift
        self._log_pace, self._second = 0.0, 0
        self._pace = 1.0
        self.model = self._drawn(deviation.model or profiled, deviation.sigma)

    def step_s(self, load: StepLoad, now: float) -> float:
        """Return the seconds of a step that begins at `now`."""
        if self._drift and int(now) > self._second:
            self._walk(int(now))
        return self.model.step_s(load) * self._pace

    def _drawn(self, model: CostModel, sigma: float) -> CostModel:
        """Return the model with a factor drawn for each of its coefficients."""
        if not sigma:
            return model
        factors: list[float] = self._rng.lognormal(0.0, sigma, len(model.coefficients)).tolist()
        values = (value * factor for value, factor in zip(model.coefficients, factors, strict=True))
        return CostModel(model.kernel, *values, knee_rows=model.knee_rows, fixed_rank=model.fixed_rank)

    def _walk(self, second: int) -> None:
        """Go on by a step for each second; what would pass a bound is thrown back by it."""
        steps: list[float] = self._rng.normal(0.0, _STEP * self._drift, second - self._second).tolist()
        for step in steps:
            moved = self._log_pace + step
            held = max(-self._drift, min(self._drift, moved))
            self._log_pace = max(-self._drift, min(self._drift, 2 * held - moved))
        self._second, self._pace = second, float(np.exp(self._log_pace))
