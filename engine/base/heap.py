"""The process's heap: how freed memory is kept for the next step. An engine calls this once, before it serves.

A step on a CPU allocates and frees the same temporaries again and again. By default glibc gives large ones back to
the system at once, which then hands them out page by page and zeroed: measured as half of the processor time of a
small model's decode step, and 2,000 page faults a step.
"""

import ctypes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8  # glibc's malloc.h
_KEPT_BYTES = 1 << 30  # free memory at the heap's top that is not given back
_GROWTH_BYTES = 64 << 20  # by which the heap grows
_HEAP_BYTES = 32 << 20  # allocations up to this size, the largest that glibc lets one set, come from the heap


def retain_freed_memory() -> bool:
    """Keep freed memory in the process, in one heap for all threads. False where the C library cannot (not glibc)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no such function; no such library; Windows
        return False
    settings = (
        (_M_TRIM_THRESHOLD, _KEPT_BYTES),
        (_M_TOP_PAD, _GROWTH_BYTES),
        (_M_MMAP_THRESHOLD, _HEAP_BYTES),
        (_M_ARENA_MAX, 1),
    )
    return all(mallopt(parameter, value) == 1 for parameter, value in settings)
