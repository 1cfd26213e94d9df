"""CudaCopy over a fake driver: pinned buffers, copies in the device's own context, errors by the call's name."""

import ctypes
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from tests.transport.fake_device import ARENA_BYTES, BASE, FakeDevice
from tests.transport.pattern import content
from transport.errors import PathUnavailable
from transport.paths import cuda_copy as cuda
from transport.paths.cuda_copy import CudaCopy

PORTABLE = 1


class FakeDriver:
    """The calls of libcuda that are used, over `devices`; `current` is the context that was entered last."""

    def __init__(self, *devices: FakeDevice) -> None:
        self._devices = {device.number: device for device in devices}
        self.retained: list[int] = []
        self.current: int | None = None
        self.pinned: list[ctypes.Array[ctypes.c_char]] = []
        self.failing: str | None = None

    def __getitem__(self, name: str) -> Callable[..., int]:
        if name == self.failing:
            return lambda *arguments: 700
        calls: dict[str, Callable[..., int]] = {
            "cuInit": self._start,
            "cuDevicePrimaryCtxRetain": self._retain,
            "cuCtxSetCurrent": self._enter,
            "cuMemHostAlloc": self._pin,
            "cuMemcpyDtoH_v2": self._to_host,
            "cuMemcpyHtoD_v2": self._to_device,
        }
        return calls[name]

    def _start(self, flags: int) -> int:
        assert flags == 0
        return 0

    def _retain(self, into: SimpleNamespace, device: int) -> int:
        self.retained.append(device)
        into._obj.value = 1000 + device
        return 0

    def _enter(self, context: ctypes.c_void_p) -> int:
        self.current = (context.value or 0) - 1000
        return 0

    def _pin(self, into: SimpleNamespace, nbytes: ctypes.c_size_t, flags: int) -> int:
        assert flags == PORTABLE
        self.pinned.append(ctypes.create_string_buffer(nbytes.value))
        into._obj.value = ctypes.addressof(self.pinned[-1])
        return 0

    def _to_host(self, to: ctypes.c_void_p, start: ctypes.c_uint64, nbytes: ctypes.c_size_t) -> int:
        self._here().to_host(self._here().number, start.value, _at(to, nbytes))
        return 0

    def _to_device(self, to: ctypes.c_uint64, start: ctypes.c_void_p, nbytes: ctypes.c_size_t) -> int:
        self._here().to_device(_at(start, nbytes), self._here().number, to.value)
        return 0

    def _here(self) -> FakeDevice:
        assert self.current is not None
        return self._devices[self.current]


def _at(address: ctypes.c_void_p, nbytes: ctypes.c_size_t) -> memoryview:
    assert address.value is not None
    return memoryview((ctypes.c_ubyte * nbytes.value).from_address(address.value)).cast("B")


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    fake = FakeDriver(FakeDevice(content(0, ARENA_BYTES), 0), FakeDevice(number=1))

    def load(library: str) -> FakeDriver:
        return fake

    monkeypatch.setattr(cuda.ctypes, "CDLL", load)
    return fake


def test_bytes_go_from_device_to_device_through_pinned_memory(driver: FakeDriver) -> None:
    copy = CudaCopy()
    for _ in range(2):
        buffer = copy.buffer(100)
        copy.to_host(0, BASE + 5, buffer[:90])
        copy.to_device(buffer[:90], 1, BASE + 40)
        there = bytearray(90)
        copy.to_host(1, BASE + 40, memoryview(there))
        assert there == content(5, 90).tobytes()
    assert driver.retained == [0, 1], "a context is retained once"
    assert [len(pinned) for pinned in driver.pinned] == [100, 100]


@pytest.mark.parametrize("call", ["cuInit", "cuDevicePrimaryCtxRetain", "cuMemHostAlloc", "cuMemcpyDtoH_v2"])
def test_what_fails_is_told_by_name(driver: FakeDriver, call: str) -> None:
    driver.failing = call
    with pytest.raises(PathUnavailable, match=f"{call} failed with CUDA error 700"):
        copy_a_byte()


def copy_a_byte() -> None:
    copy = CudaCopy()
    copy.to_host(0, BASE, copy.buffer(1))


def test_without_a_driver_there_is_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_LIBRARY", "libcuda_of_nowhere.so")
    with pytest.raises(PathUnavailable, match="no CUDA driver here"):
        CudaCopy()
