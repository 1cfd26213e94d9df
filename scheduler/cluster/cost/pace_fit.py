"""Fit paces to measured steps, online: for several profiles of one node at once.

Each profile says what a step takes, in three parts (see `Pace`). A factor θ on each part is fitted to the steps
measured so far, by least squares of the relative error, with forgetting and a ridge:

    minimise over θ    Σ_i λ^age_i · (y_i - θ·x_i)² + ridge · |θ - level|²

x_i are the parts of step i, y_i its measured seconds, both over all that the profile says it takes. `level` is
the mean of y_i of late: where steps do not say which part is slow, all are taken to be. A pace that drifts is
followed faster by one factor for all: what is believed is θ · trend, with trend the mean of y over that of θ·x of
late.

Chance must not lead astray. A step counts as no more than twice, and no less than half, what the
middle one of its batch is to its prediction. Where two batches on end say that the node changed its pace at once,
what was learnt is scaled by as much, and mostly forgotten.
"""

import math
from typing import cast

import numpy as np

from scheduler.cluster.cost.pace import Pace
from scheduler.cluster.cost.step_tally import Floats

_MEMORY = 400.0  # steps after which the fit has forgotten all but 1/e
_TREND_MEMORY = 48.0
_TREND_PRIOR = 4.0  # steps that the profile counts as
_RIDGE = 0.2
_OUTLIER = 2.0
_CHANGED = math.log(1.25)
_KEPT = 0.1
_MOST = 1e2  # times the profile's seconds: beyond, and below one over it, nothing is believed
_WORST = 0.1  # squared error of one step


class PaceFits:
    """Owner of what was learnt under each of `count` profiles; its size does not grow with the steps."""

    def __init__(self, count: int) -> None:
        self._theta: Floats = np.ones((count, 3))
        self._squares: Floats = np.zeros((count, 3, 3))
        self._products: Floats = np.zeros((count, 3))
        self._late_x: Floats = np.full((count, 3), _TREND_PRIOR / 3)
        self._late_y: Floats = np.full(count, _TREND_PRIOR)
        self._ridge: Floats = _RIDGE * np.eye(3)
        self._apart: Floats = np.zeros(count)  # log of the last batch's median over its prediction

    def pace(self, profile: int) -> Pace:
        """Return what is believed under one of the profiles."""
        factors = _within(self._theta[profile] * self._trend()[profile], 1 / _MOST, _MOST)
        return Pace(*factors.tolist())

    def learn(self, parts: Floats, seconds: Floats) -> Floats:
        """Take in steps of [profiles, steps, parts] that took [steps] seconds.

        Returns [profiles, steps] squared relative errors of what was believed before.
        """
        told = parts.sum(2)
        x, y = parts / told[:, :, None], _within(seconds / told, 1 / _MOST, _MOST)
        predicted = (x @ self._theta[:, :, None])[:, :, 0] * self._trend()[:, None]
        ratios = y / predicted
        middle = np.sort(ratios, axis=1)[:, ratios.shape[1] // 2]
        ratios = _within(ratios, middle[:, None] / _OUTLIER, middle[:, None] * _OUTLIER)
        self._notice_changes(np.log(middle))
        self._add(x, ratios * predicted)
        return np.minimum(np.log(ratios) ** 2, _WORST)

    def _notice_changes(self, apart: Floats) -> None:
        before, self._apart = self._apart, apart
        changed = (np.abs(apart) > _CHANGED) & (np.abs(before) > _CHANGED) & (apart * before > 0)
        if not changed.any():
            return
        factor, kept = np.where(changed, np.exp(apart), 1.0), np.where(changed, _KEPT, 1.0)
        scaled = factor * np.where(changed, self._trend(), 1.0)
        self._squares *= kept[:, None, None]
        self._products *= (kept * scaled)[:, None]
        self._late_x *= kept[:, None]
        self._late_y *= kept * factor
        self._apart = np.where(changed, 0.0, apart)

    def _add(self, x: Floats, y: Floats) -> None:
        """Forget a little, add the steps, and fit anew."""
        steps = x.shape[1]
        forgotten, late = math.exp(-steps / _MEMORY), math.exp(-steps / _TREND_MEMORY)
        across = x.transpose(0, 2, 1)
        self._squares = self._squares * forgotten + across @ x
        self._products = self._products * forgotten + (across @ y[:, :, None])[:, :, 0]
        self._late_x = self._late_x * late + x.sum(1)
        self._late_y = self._late_y * late + y.sum(1)
        level = self._late_y / self._late_x.sum(1)
        right = self._products + _RIDGE * level[:, None]
        found = cast("Floats", np.linalg.solve(self._squares + self._ridge, right[:, :, None]))
        self._theta = _within(found[:, :, 0], 1 / _MOST, _MOST)

    def _trend(self) -> Floats:
        return self._late_y / (self._theta * self._late_x).sum(1)


def _within(values: Floats, least: Floats | float, most: Floats | float) -> Floats:
    """Clip, in half the time that numpy's own takes for few values."""
    return np.minimum(np.maximum(values, least), most)
