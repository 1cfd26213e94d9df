"""Fitting a cost model to measured steps. Knows measurements as values; who took them, and on what, is not
asked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import cast

import numpy as np
from numpy.typing import NDArray

# scipy has no stubs: `_nnls` states the types.
from scipy.optimize import nnls  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

from scheduler.cluster.cost.model import CostModel, Kernel, StepLoad, features

MIN_MEASUREMENTS = 24
_REWEIGHTINGS = 4
_KNEES = (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)

_Floats = NDArray[np.float64]
_nnls = cast("Callable[[_Floats, _Floats], tuple[_Floats, float]]", nnls)


class TooFewMeasurements(ValueError):
    """Not enough steps were measured to fit ten coefficients and hold some out."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One kind of step and the seconds it took."""

    load: StepLoad
    step_s: float


@dataclass(frozen=True, slots=True)
class HeldOutError:
    """Relative error, |predicted - measured| / measured, of steps that the fit had not seen."""

    mean: float
    median: float
    p95: float
    worst: float


def fit(rows: Sequence[Measurement], kernel: Kernel) -> CostModel:
    """Fit coefficients of least squared relative error, none negative (Lawson and Hanson's active-set NNLS).

    Of all knees of the roofline, or none, the one that leaves the least error is taken. Rows are weighted by
    1 / seconds, so that a 5 ms decode counts as much as a 500 ms prefill. The seconds are the measured ones
    at first, then those that the fit before predicted (iteratively reweighted least squares). With the
    measured ones alone, steps that chance made short would weigh most. The fit would then lie below the mean
    by twice their squared spread. Columns are scaled to unit norm, since they differ by ten orders of
    magnitude.
    """
    if len(rows) < MIN_MEASUREMENTS:
        raise TooFewMeasurements(f"rows={len(rows)}: measure at least {MIN_MEASUREMENTS} different steps")
    fits = [_fit(rows, kernel, knee_rows) for knee_rows in (inf, *_KNEES)]
    return min(fits, key=lambda each: each[1])[0]


def _fit(rows: Sequence[Measurement], kernel: Kernel, knee_rows: float) -> tuple[CostModel, float]:
    """Fit the best model of that knee (infinite: of none); return the norm of its relative residual too."""
    seconds = np.array([row.step_s for row in rows])
    fixed_rank = _largest_rank(rows) if kernel is Kernel.FIXED else 0
    design: _Floats = np.array([features(row.load, kernel, knee_rows, fixed_rank) for row in rows])
    coefficients: _Floats = np.zeros(int(design.shape[1]))
    residual, scale = inf, seconds
    for _ in range(_REWEIGHTINGS):
        weighted = design / scale[:, None]
        norms = np.linalg.norm(weighted, axis=0)
        norms[norms == 0] = 1.0
        scaled, residual = _nnls(weighted / norms, seconds / scale)
        coefficients = scaled / norms
        scale = np.maximum(design @ coefficients, seconds.min())
    found: list[float] = coefficients.tolist()
    knee_rows = knee_rows if found[-1] else 0.0
    return CostModel(kernel, *found, knee_rows=knee_rows, fixed_rank=fixed_rank), float(residual)


def _largest_rank(rows: Sequence[Measurement]) -> int:
    """Return the largest rank that was measured, at least 1: FIXED kernels are taken to have been made for it."""
    return max(1, *(part.rank for row in rows for part in row.load.adapters))


def held_out_error(rows: Sequence[Measurement], kernel: Kernel, folds: int = 5) -> HeldOutError:
    """Measure the error of each row under the fit to the other folds; fold i holds out rows i, i + folds, ..."""
    errors: list[float] = []
    for fold in range(folds):
        model = fit([row for at, row in enumerate(rows) if at % folds != fold], kernel)
        errors += [abs(model.step_s(row.load) - row.step_s) / row.step_s for row in rows[fold::folds]]
    median, p95 = np.percentile(errors, [50, 95]).tolist()
    return HeldOutError(float(np.mean(errors)), median, p95, max(errors))
