"""What the kernels' launchers share: how a kernel is launched, and memory that keeps its address from step to step."""

# Triton has no types.
# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false

from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float8_e4m3fn: tl.float8e4nv,
}

_PINNED = 3  # copies that may be on their way: the steps that a host may run ahead of its device, and one


def launch(kernel: Any, programs: int, *arguments: object, **constants: object) -> None:
    """Launch a one-dimensional grid on the current stream; the constants include Triton's own, as `num_warps`."""
    kernel[(programs,)](*arguments, **constants)


def multiprocessors(device: torch.device) -> int:
    """How many the device has; 1 on a CPU, where the interpreter runs one block after another."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


class SentWords:
    """Words that the host rewrites and the device reads, at one address until they outgrow it.

    A copy goes out from pinned memory and waits for nothing; pinned memory is written again only when its last copy
    has arrived. `generation` counts the addresses: a captured graph is good for the one it was captured under.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self._device, self._sent = device, 0
        self.generation = 0
        self._allocate(capacity)

    def send(self, words: np.ndarray) -> None:
        """Copy `words` ([n] int64) to the device on the current stream."""
        if len(words) > self.on_device.numel():
            self.generation += 1
            self._allocate(2 * len(words))
        slot = self._sent % _PINNED
        self._sent += 1
        if self._device.type == "cuda":
            self._arrived[slot].synchronize()
        self._pinned[slot][: len(words)] = torch.from_numpy(words)
        self.on_device[: len(words)].copy_(self._pinned[slot][: len(words)], non_blocking=True)
        if self._device.type == "cuda":
            self._arrived[slot].record()

    def _allocate(self, capacity: int) -> None:
        cuda = self._device.type == "cuda"
        self.on_device: Tensor = torch.zeros(capacity, dtype=torch.int64, device=self._device)
        self._pinned = [torch.zeros(capacity, dtype=torch.int64, pin_memory=cuda) for _ in range(_PINNED)]
        self._arrived = [torch.cuda.Event() for _ in range(_PINNED)] if cuda else []
