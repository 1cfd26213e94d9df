"""A device's memory without a device, behind addresses of its own: whoever touched it as host memory would crash."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

BASE = 1 << 44  # no address of this process
ARENA_BYTES = 10_000
GUARD = 0xA5


@dataclass
class FakeDevice:
    """The memory of device `number`, and the copies to and from it."""

    memory: NDArray[np.uint8] = field(default_factory=lambda: np.full(ARENA_BYTES, GUARD, np.uint8))
    number: int = 0
    buffers: int = 0

    def buffer(self, nbytes: int) -> memoryview:
        self.buffers += 1
        return memoryview(bytearray(nbytes))

    def to_host(self, device: int, address: int, into: memoryview) -> None:
        into[:] = self.memory[self._at(device, address) :][: len(into)].data

    def to_device(self, view: memoryview, device: int, address: int) -> None:
        self.memory[self._at(device, address) :][: len(view)] = view

    def _at(self, device: int, address: int) -> int:
        assert device == self.number
        assert BASE <= address < BASE + ARENA_BYTES
        return address - BASE
