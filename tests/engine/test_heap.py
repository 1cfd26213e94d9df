"""What the call is for: no page faults for temporaries that come again, in any thread."""

import subprocess
import sys

import pytest

from engine.base.heap import retain_freed_memory

FAULTS = """
import resource, threading, torch
from engine.base.heap import retain_freed_memory
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
