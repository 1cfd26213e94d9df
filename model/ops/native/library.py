"""Reach the compiled functions, and lay out what they read."""

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np

from lora.compiled import load_library

HEADS = np.dtype(
    [(name, "u8") for name in ("rows", "qk_norm", "cos", "sin", "slots", "keys", "values")]
    + [(name, "i8") for name in ("block_stride", "block_size", "queries", "heads", "dim")]
)


class Norm(Protocol):
    """Norms rows of so many numbers; see RowOps.norm. All but counts are addresses."""

    def __call__(
        self, x: int, weight: int, rows: int, width: int, eps: float, to: int, is_narrow: bool, threads: int
    ) -> None: ...


class StoreHeads(Protocol):
    """Norms, turns and stores what HEADS, at an address, says; see RowOps.store_heads."""

    def __call__(self, heads: int, rows: int, eps: float, is_narrow: bool, threads: int) -> None: ...


class WidthwiseOp(Protocol):
    """Computes rows of so many numbers from those at one address, and leaves them at another."""

    def __call__(self, x: int, y: int, rows: int, width: int, is_narrow: bool, threads: int) -> None: ...


@dataclass(frozen=True, slots=True)
class RowFunctions:
    """What is compiled."""

    norm: Norm
    store_heads: StoreHeads
    gate: WidthwiseOp
    add: WidthwiseOp


@cache
def load_row_functions() -> RowFunctions | None:
    """Load the compiled code; None where there is none. Raises RuntimeError, see load_library."""
    library = load_library("model.ops.native._rows", HEADS)
    if library is None:
        return None
    address, number, real, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
    found = (
        library.loraserve_norm,
        library.loraserve_store_heads,
        library.loraserve_gate,
        library.loraserve_add,
    )
    norm, store_heads, gate, add = found
    norm.argtypes = (address, address, number, number, real, address, flag, flag)
    store_heads.argtypes = (address, number, real, flag, flag)
    for widthwise in (gate, add):
        widthwise.argtypes = (address, address, number, number, flag, flag)
    for function in found:
        function.restype = None
    return RowFunctions(norm, store_heads, gate, add)
