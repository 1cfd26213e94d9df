"""Memory of the machine: temporaries that come again cost no page faults, and a control group's limit counts."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.base import machine_memory
from engine.base.machine_memory import available_bytes, retain_freed_memory

FAULTS = """
import resource, threading, torch
from engine.base.machine_memory import retain_freed_memory
assert retain_freed_memory()
torch.set_num_threads(1)
def step():
    return [torch.ones(1 << 18) for _ in range(6)] and torch.ones(1 << 22).sum()
def count():
    for _ in range(3): step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10): step()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
faults = []
count()
thread = threading.Thread(target=count)
thread.start()
thread.join()
print(*faults)
"""


def test_temporaries_of_a_step_cost_no_page_faults() -> None:
    if not retain_freed_memory():
        pytest.skip("the C library has no mallopt")
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    assert [int(count) < 200 for count in done.stdout.split()] == [
        True,
        True,
    ]  # ten steps that touch 5,600 pages each


@pytest.mark.parametrize(
    ("limit", "used", "available"),
    [("max", "7", 100 << 10), ("4096", "1096", 3000), ("4096", "5000", 0), (str(1 << 30), "0", 100 << 10)],
)
def test_what_is_available_on_a_cpu_is_within_the_control_groups_limit(
    limit: str, used: str, available: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  200 kB\nMemAvailable:  100 kB\n")
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text(f"{used}\n")
    monkeypatch.setattr(machine_memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(machine_memory, "_CGROUP", tmp_path)
    assert available_bytes(torch.device("cpu")) == available
