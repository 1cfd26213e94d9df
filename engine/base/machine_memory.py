"""Ask how much memory a device has left, and have the process keep what it frees for the next step.

A step on a CPU allocates and frees the same temporaries again and again. By default glibc gives large ones back to
the system at once, which then hands them out page by page and zeroed. For a small model's decode step that was measured
as half of the processor time and 2,000 page faults a step.
"""

import ctypes
import os
from pathlib import Path

import torch

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8  # glibc's malloc.h
_KEPT_BYTES = 1 << 30  # free memory at the heap's top that is not given back
_GROWTH_BYTES = 64 << 20  # by which the heap grows
_HEAP_BYTES = 32 << 20  # allocations up to this size, the largest that glibc lets one set, come from the heap

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def available_bytes(device: torch.device) -> int:
    """Return how many bytes could be allocated on `device` now; on a CPU within its control group's limit, if any."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    fields = dict(line.split(":") for line in _MEMINFO.read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = (_read_number(_CGROUP / name) for name in ("memory.max", "memory.current"))
    return available if limit is None or used is None else max(0, min(available, limit - used))


def total_bytes(device: torch.device) -> int:
    """Return how many bytes `device` has in all; of a CPU's, what its control group allows."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(total, _read_number(_CGROUP / "memory.max") or total)


def _read_number(path: Path) -> int | None:
    text = path.read_text().strip() if path.is_file() else "max"
    return int(text) if text.isdigit() else None


def retain_freed_memory() -> bool:
    """Keep freed memory in the process, in one heap for all threads. An engine calls this once, before it serves.

    False where the C library cannot (not glibc).
    """
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
