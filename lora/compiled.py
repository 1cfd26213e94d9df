"""Load libraries that were compiled when the project was installed.

They are called by their C functions, so that they are tied to neither a version of Python nor one of torch. They are
loaded after torch and take its pool of threads: two pools would wait for each other's cores.
"""

import ctypes
from importlib import import_module
from importlib.util import find_spec

import numpy as np


def load_library(name: str, *layouts: np.dtype[np.void]) -> ctypes.CDLL | None:
    """Load the module `name`, which reads what is laid out as `layouts`; None if it was not compiled.

    Raises RuntimeError if it was compiled from other sources than these.
    """
    found = find_spec(name)
    if found is None or found.origin is None:
        return None
    import_module("torch")  # whose pool of threads must be there first
    library = ctypes.CDLL(found.origin)
    if [library.loraserve_size_of(kind) for kind in range(len(layouts))] != [
        each.itemsize for each in layouts
    ]:
        raise RuntimeError(f"{found.origin} was compiled from other sources: install the project again")
    return library
