"""Compiles Triton's kernels for an H100 on a machine without one, exactly as launched there.

Inside `pretended_h100()` a launch specialises its arguments (dtypes, alignment, divisibility), compiles for sm_90
and is written down instead of run, so that a test can call the very code that serves:

    with pretended_h100() as launches:
        step.add_lora(y, x, 0, SiteGroup.QKV)
    assert launches[0].spilled_bytes == 0 and "LDG.E.128" in launches[0].sass

Tensors may be on the CPU or on "meta" (no memory). The binaries are kept in a folder of the system's temporary one.
"""

import getpass
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from tests.kernels.interpreter import INTERPRETED

COMPILES = not INTERPRETED
TARGET = GPUTarget("cuda", 90, 32)
SHARED_BYTES = 227 * 1024  # what one block of an H100 may have
REGISTERS = 64 * 1024  # of one multiprocessor
THREADS = 2048
_DEVICE = -1  # the pretended one's number, so that kernels of a real device are kept apart


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel's name, its grid, its arguments (tensors by address, dtype and shape) and its binary."""

    name: str
    grid: tuple[int, int, int]
    arguments: tuple[object, ...]
    num_warps: int
    shared_bytes: int
    cubin: bytes

    @cached_property
    def sass(self) -> str:
        """The machine code."""
        return self._cuobjdump("-sass")

    @cached_property
    def usage(self) -> dict[str, int]:
        """What the assembler says of the kernel: REG, STACK, SHARED, LOCAL and so on."""
        return {
            key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", self._cuobjdump("-res-usage"))
        }

    @property
    def registers(self) -> int:
        """Of each thread."""
        return self.usage["REG"]

    @property
    def spilled_bytes(self) -> int:
        """Of each thread's memory for what found no register; also an array indexed at run time."""
        return self.usage["STACK"] + self.usage["LOCAL"]

    @property
    def blocks_per_multiprocessor(self) -> int:
        """How many fit at once, by registers, shared memory and threads."""
        threads = self.num_warps * 32
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * threads)
        return min(by_registers, SHARED_BYTES // max(1, self.shared_bytes + 1024), THREADS // threads)

    def count(self, instruction: str) -> int:
        """How often the instruction (`LDG.E.128`, `HGMMA`, `HMMA`, ...) stands in the machine code."""
        return self.sass.count(instruction)

    def _cuobjdump(self, what: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            command = [knobs.nvidia.cuobjdump.path, what, file.name]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@contextmanager
def pretended_h100() -> Iterator[list[Launch]]:
    """Everything launched inside is compiled for sm_90 and listed, and nothing runs."""
    launches: list[Launch] = []
    with knobs.cache.scope():
        knobs.cache.dir = str(Path(tempfile.gettempdir()) / f"loraserve-kernels-{getpass.getuser()}")
        pretender: Any = _Pretender(launches)
        driver.set_active(pretender)
        try:
            yield launches
        finally:
            driver._active = None  # asked again when next needed; without a device `reset_active` raises


class _Pretender:
    """Stands where the CUDA driver would, as one more device, and writes launches down."""

    def __init__(self, launches: list[Launch]) -> None:
        self.launches = launches
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return _DEVICE

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_BYTES}

    def load_binary(
        self, name: str, cubin: bytes, shared: int, device: int
    ) -> tuple[str, bytes, int, int, int]:
        """(module, function, registers, spills, most threads): the function is its own binary."""
        return name, cubin, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(x: int, y: int, z: int, stream: int, cubin: bytes, *rest: Any) -> None:
            arguments = tuple(map(_told, rest[4:]))  # after two of metadata and two of hooks
            launch = Launch(metadata.name, (x, y, z), arguments, metadata.num_warps, metadata.shared, cubin)
            active: Any = driver.active
            active.launches.append(launch)  # the kernel outlives the pretender that compiled it

        return launch


def _told(argument: object) -> object:
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr(), argument.dtype, tuple(argument.shape)
    return argument
