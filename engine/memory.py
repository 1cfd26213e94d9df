"""How much memory a device has left. Who gets how much of it is `engine.room`'s."""

from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def available_bytes(device: torch.device) -> int:
    """Bytes that could be allocated on `device` now; on a CPU within its control group's limit, if any."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    fields = dict(line.split(":") for line in _MEMINFO.read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = (_read_number(_CGROUP / name) for name in ("memory.max", "memory.current"))
    return available if limit is None or used is None else max(0, min(available, limit - used))


def _read_number(path: Path) -> int | None:
    text = path.read_text().strip() if path.is_file() else "max"
    return int(text) if text.isdigit() else None
