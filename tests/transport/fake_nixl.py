"""A NIXL of one process, for what needs a GPU: agents that read each other's registered memory, the device's as well.

It is as strict as the real one: what is not registered, or with another kind of memory or device, is not found.
"""

# ruff: noqa: N802, N815  (the names are NIXL's)

import ctypes
from dataclasses import dataclass, field
from types import SimpleNamespace

from tests.transport.fake_device import FakeDevice

Row = tuple[int, int, int]  # address, bytes, device


class NotFoundError(Exception):
    """No such memory, or no such agent."""


class BackendError(Exception):
    """The memory cannot be registered."""


class UnusedError(Exception):
    """Stands for all the others."""


@dataclass
class Registered:
    """Descriptors of memory that is to be registered: rows of (address, bytes, device, note)."""

    kind: str
    rows: list[tuple[int, int, int, str]]


@dataclass
class Wanted:
    """Descriptors of one end of a read."""

    kind: str
    rows: list[Row]


@dataclass
class FakeNixl:
    """What `NixlAgent` uses of the bindings. `devices` are those whose memory UCX takes, by number; the memory of a
    device that is not there cannot be registered, as on a machine without peer memory. `takes_host` likewise."""

    takes_host: bool = True
    devices: dict[int, FakeDevice] = field(default_factory=dict[int, FakeDevice])
    agents: dict[str, "FakeAgent"] = field(default_factory=dict[str, "FakeAgent"])

    nixlBackendError = BackendError
    nixlNotFoundError = NotFoundError
    nixlCancelledError = nixlInvalidParamError = nixlMismatchError = nixlNotAllowedError = UnusedError
    nixlNotPostedError = nixlNotSupportedError = nixlRemoteDisconnectError = UnusedError
    nixlRepostActiveError = nixlUnknownError = UnusedError
    nixlAgentConfig = SimpleNamespace
    nixlRegDList = Registered
    nixlXferDList = Wanted
    NIXL_THREAD_SYNC_STRICT, NIXL_READ, DRAM_SEG, VRAM_SEG = "strict", "read", "host", "device"
    NIXL_SUCCESS, NIXL_IN_PROG = 0, 1

    def nixlAgent(self, name: str, config: SimpleNamespace) -> "FakeAgent":
        """A new agent."""
        assert config.syncMode == self.NIXL_THREAD_SYNC_STRICT
        self.agents[name] = FakeAgent(self, name)
        return self.agents[name]


class FakeAgent:
    """One end. A read is done when it has been posted."""

    def __init__(self, nixl: FakeNixl, name: str) -> None:
        self._nixl = nixl
        self._name = name
        self.registered: list[tuple[str, Row]] = []

    def createBackend(self, kind: str, options: dict[str, str]) -> None:
        """UCX, with errors when a peer dies."""
        assert (kind, options) == ("UCX", {"ucx_error_handling_mode": "peer"})

    def registerMem(self, memory: Registered, backends: list[object]) -> None:
        """Take it, or say that it cannot be taken."""
        for address, nbytes, device, _ in memory.rows:
            on_host = memory.kind == self._nixl.DRAM_SEG
            if not (self._nixl.takes_host if on_host else device in self._nixl.devices):
                raise BackendError("no peer memory")
            self.registered.append((memory.kind, (address, nbytes, device)))

    def getLocalMD(self) -> bytes:
        """Its name is enough here."""
        return self._name.encode()

    def loadRemoteMD(self, metadata: bytes) -> bytes:
        """The name of a peer."""
        return metadata

    def createXferReq(
        self, operation: str, local: Wanted, remote: Wanted, peer: str, notice: str, backends: list[object]
    ) -> tuple[Wanted, Wanted]:
        """Check both ends."""
        assert operation == self._nixl.NIXL_READ
        self._find(local)
        self._nixl.agents[peer]._find(remote)
        return local, remote

    def postXferReq(self, handle: tuple[Wanted, Wanted], notice: str) -> int:
        """Read."""
        local, remote = handle
        for (to, nbytes, to_device), (start, _, device) in zip(local.rows, remote.rows, strict=True):
            piece = bytearray(nbytes)
            if remote.kind == self._nixl.VRAM_SEG:
                self._nixl.devices[device].to_host(device, start, memoryview(piece))
            else:
                piece[:] = ctypes.string_at(start, nbytes)
            if local.kind == self._nixl.VRAM_SEG:
                self._nixl.devices[to_device].to_device(memoryview(piece), to_device, to)
            else:
                ctypes.memmove(to, bytes(piece), nbytes)
        return self._nixl.NIXL_SUCCESS

    def releaseXferReq(self, handle: tuple[Wanted, Wanted]) -> None:
        """Nothing is held."""

    def _find(self, wanted: Wanted) -> None:
        for address, nbytes, device in wanted.rows:
            if not any(
                kind == wanted.kind and where[2] == device and _within(address, nbytes, where)
                for kind, where in self.registered
            ):
                raise NotFoundError(f"{nbytes} bytes at {address:#x} of device {device}")


def _within(address: int, nbytes: int, span: Row) -> bool:
    return span[0] <= address and address + nbytes <= span[0] + span[1]
