"""Reach the compiled function, and lay out what it reads."""

import ctypes
from functools import cache
from typing import Protocol

import numpy as np

from lora.compiled import load_library

PART = np.dtype(
    [("Bt", "u8"), ("rank_start", "i4"), ("rank_stop", "i4"), ("out_start", "i4"), ("out_stop", "i4")]
)
SITE = np.dtype(
    [("A", "u8"), ("scale", "u8"), ("width", "i8"), ("ranks", "i4"), ("num_parts", "i4"), ("parts", PART, 3)]
)
SEGMENT = np.dtype([("start", "i8"), ("stop", "i8"), ("sites", "u8"), ("num_sites", "i8")])


class AddLora(Protocol):
    """Adds the updates of `count` segments (of SEGMENT, at an address) at one site of theirs, with so many threads.

    y and x are addresses of rows of so many numbers, or x of int64 ids of tokens, one a row. What is narrow is
    bfloat16, else float32.
    """

    def __call__(
        self,
        y: int, y_width: int, x: int, x_width: int, segments: int, count: int, site: int,
        x_is_tokens: bool, rows_are_narrow: bool, weights_are_narrow: bool, threads: int,
    ) -> None: ...  # fmt: skip


@cache
def load_add_lora() -> AddLora | None:
    """Load it; None where the project was installed without a compiler. Raises RuntimeError, see load_library."""
    library = load_library("lora.ops.native._lora", SEGMENT, SITE, PART)
    if library is None:
        return None
    address, number, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    add = library.loraserve_add_lora
    add.argtypes = (address, number, address, number, address, number, number, flag, flag, flag, flag)
    add.restype = None
    return add
