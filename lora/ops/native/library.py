"""Reach the compiled functions, and lay out what they read.

The library is called by its C functions, so that it is tied to neither a version of Python nor one of torch. It is
loaded after torch and takes its pool of threads: two pools would wait for each other's cores.
"""

import ctypes
from functools import cache
from importlib.util import find_spec
from typing import Protocol

import numpy as np
import torch  # noqa: F401 - its pool of threads must be there first

PART = np.dtype(
    [("Bt", "u8"), ("rank_start", "i4"), ("rank_stop", "i4"), ("out_start", "i4"), ("out_stop", "i4")]
)
SITE = np.dtype([("A", "u8"), ("scale", "u8"), ("ranks", "i4"), ("num_parts", "i4"), ("parts", PART, 3)])
SEGMENT = np.dtype([("start", "i8"), ("stop", "i8"), ("sites", "u8"), ("num_sites", "i8")])

_NAME = "lora.ops.native._lora"


class AddLora(Protocol):
    """Adds the updates of `count` segments (of SEGMENT, at an address) at one site of theirs, with so many threads.

    y and x are addresses of rows of so many numbers. What is narrow is bfloat16, else float32.
    """

    def __call__(
        self,
        y: int, y_width: int, x: int, width: int, segments: int, count: int, site: int,
        rows_are_narrow: bool, weights_are_narrow: bool, threads: int,
    ) -> None: ...  # fmt: skip


@cache
def load_add_lora() -> AddLora | None:
    """Load the compiled code; None where the project was installed without a compiler.

    Raises RuntimeError if it was compiled from other sources than these.
    """
    found = find_spec(_NAME)
    if found is None or found.origin is None:
        return None
    library = ctypes.CDLL(found.origin)
    sizes = tuple(library.loraserve_size_of(kind) for kind in range(3))
    if sizes != (SEGMENT.itemsize, SITE.itemsize, PART.itemsize):
        raise RuntimeError(f"{found.origin} was compiled from other sources: install the project again")
    address, number, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    add = library.loraserve_add_lora
    add.argtypes = (address, number, address, number, address, number, number, flag, flag, flag)
    add.restype = None
    return add
