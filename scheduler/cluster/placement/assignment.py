"""Exact assignment, with types. Nothing else in placement knows who solves it."""

from collections.abc import Callable
from typing import cast

import numpy as np
from numpy.typing import NDArray

# scipy has no stubs: `_solve` states the types.
from scipy.optimize import (  # pyright: ignore[reportMissingTypeStubs]
    linear_sum_assignment,  # pyright: ignore[reportUnknownVariableType]
)

_Indices = NDArray[np.intp]
_solve = cast("Callable[..., tuple[_Indices, _Indices]]", linear_sum_assignment)


def best_assignment(gains: NDArray[np.float64]) -> list[int]:
    """Return the column of each row of a square matrix, each taken once, for the largest sum of gains."""
    _, columns = _solve(gains, maximize=True)
    return columns.tolist()
