"""Describe the machine under a benchmark, and measure how much of it others used meanwhile.

A figure from a busy machine is no figure. So every run carries the share of the processor that processes
outside it took. Knows nothing of what is measured. Reads /proc, hence Linux.
"""

import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
BUSY_FIELDS = (0, 1, 2, 5, 6, 7)  # of /proc/stat: user, nice, system, irq, softirq, steal
QUIET_CORES = 0.2


def describe() -> dict[str, str | int]:
    """Describe processor, cores and system for a results file."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def busy_s() -> float:
    """Read the processor seconds that all cores spent on anything since the machine started."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    return sum(int(fields[field]) for field in BUSY_FIELDS) / TICKS_PER_S


def cpu_s_by_process() -> Mapping[int, tuple[int, float]]:
    """Read (parent, processor seconds with reaped children) of every process there is."""
    found: dict[int, tuple[int, float]] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):  # it ended between the listing and the reading
            continue
        found[int(folder.name)] = int(fields[1]), sum(map(int, fields[11:15])) / TICKS_PER_S
    return found


def tree_cpu_s(root: int) -> float:
    """Read the processor seconds of a process and everything below it."""
    processes = cpu_s_by_process()
    children: dict[int, list[int]] = {}
    for process, (parent, _) in processes.items():
        children.setdefault(parent, []).append(process)
    total_s, unseen = 0.0, [root]
    while unseen:
        process = unseen.pop()
        total_s += processes[process][1] if process in processes else 0.0
        unseen += children.get(process, [])
    return total_s


class OtherProcesses:
    """Measures how many cores' time went to processes outside `root` and its descendants.

    Use it as `with OtherProcesses() as others: ...`, then read `others.cores`.
    """

    def __init__(self, root: int | None = None) -> None:
        self.root = root or os.getpid()
        self.cores = 0.0

    def __enter__(self) -> Self:
        self._start = time.perf_counter(), busy_s(), tree_cpu_s(self.root)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        start_s, busy, own = self._start
        elapsed_s = max(time.perf_counter() - start_s, 1 / TICKS_PER_S)
        self.cores = max(0.0, (busy_s() - busy - tree_cpu_s(self.root) + own) / elapsed_s)


def wait_quiet(timeout_s: float, window_s: float = 1.0) -> float:
    """Wait until others use less than `QUIET_CORES`, at most `timeout_s`; return what they used last."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        with OtherProcesses() as others:
            time.sleep(min(window_s, max(0.0, deadline_s - time.monotonic())))
        if others.cores < QUIET_CORES or time.monotonic() >= deadline_s:
            return others.cores
