"""Copy between CUDA devices and the host through the driver's own library, for staging.

By address, not by tensor: whoever registers memory says where it lies. Each device is used in its primary context,
the one that torch uses as well, so that an address means the same to both.
"""

import ctypes
import threading

from transport.errors import PathUnavailable

_LIBRARY = "libcuda.so.1"


class CudaCopy:
    """A `DeviceCopy`. Raises PathUnavailable where there is no CUDA driver or device."""

    def __init__(self) -> None:
        try:
            self._cuda = ctypes.CDLL(_LIBRARY)
        except OSError as error:
            raise PathUnavailable(f"no CUDA driver here: {error}; device memory cannot be staged") from error
        self._lock = threading.Lock()
        self._contexts: dict[int, ctypes.c_void_p] = {}
        self._call("cuInit", 0)

    def buffer(self, nbytes: int) -> memoryview:
        """Return pinned memory that every context knows."""
        address, portable = ctypes.c_void_p(), 1
        self._enter(0)
        self._call("cuMemHostAlloc", ctypes.byref(address), ctypes.c_size_t(nbytes), portable)
        assert address.value is not None
        return memoryview((ctypes.c_ubyte * nbytes).from_address(address.value)).cast("B")

    def to_host(self, device: int, address: int, into: memoryview) -> None:
        """Fill `into` from the device, and wait for it."""
        self._enter(device)
        self._call("cuMemcpyDtoH_v2", _address_of(into), ctypes.c_uint64(address), ctypes.c_size_t(len(into)))

    def to_device(self, view: memoryview, device: int, address: int) -> None:
        """Write `view` to the device, and wait for it."""
        self._enter(device)
        self._call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), _address_of(view), ctypes.c_size_t(len(view)))

    def _enter(self, device: int) -> None:
        """Make the device's primary context this thread's."""
        with self._lock:
            if device not in self._contexts:
                context = ctypes.c_void_p()
                self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
                self._contexts[device] = context
        self._call("cuCtxSetCurrent", self._contexts[device])

    def _call(self, name: str, *arguments: object) -> None:
        status = self._cuda[name](*arguments)
        if status:
            raise PathUnavailable(f"{name} failed with CUDA error {status}: check the driver and the device")


def _address_of(view: memoryview) -> ctypes.c_void_p:
    return ctypes.c_void_p(ctypes.addressof(ctypes.c_ubyte.from_buffer(view)))
