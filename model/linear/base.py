"""The linear seam: y = x Wᵀ + b with a weight that is laid out once for the processor that multiplies by it."""

from collections.abc import Callable

from torch import Tensor

Linear = Callable[[Tensor], Tensor]
"""[T, in_features] -> [T, out_features], both contiguous and of one dtype."""
