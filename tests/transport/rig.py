"""A puller in the test's event loop with memory for bytes, and a source of the same kind of transport to pull from."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from scripts.certificates import make_certificates
from tests.transport.node_setup import MIB, Setup
from tests.transport.sources import LocalSource, ProcessSource, Source
from transport.base import Arena, Memory, Region, Transport
from transport.loopback import LoopbackNetwork, LoopbackTransport

ARENA_BYTES = 65 * MIB
GUARD = 0xA5
needs_nixl = pytest.mark.skipif(
    find_spec("nixl_cu12") is None, reason="NIXL (the extra `ucx`) is not installed"
)


@dataclass
class Rig:
    """A puller with memory for bytes, and the source that it pulls from."""

    source: Source
    puller: Transport
    target: NDArray[np.uint8] = field(repr=False)
    arena: Arena

    def into(self, offset: int, nbytes: int) -> Region:
        return self.arena.region(offset, nbytes)

    async def pull(self, name: str, into: Sequence[Region], timeout_s: float = 60.0) -> None:
        lease = await self.puller.lease(self.source.address, name, timeout_s)
        await self.puller.pull(lease, into, timeout_s)

    async def fetch(self, name: str, into: Sequence[Region], timeout_s: float = 60.0) -> None:
        await self.puller.fetch(self.source.address, name, into, timeout_s)

    async def is_clean(self, name: str, timeout_s: float = 30.0) -> bool:
        """Nothing of `name` is pinned any more, and nothing can land here."""
        self.source.withdraw(name)
        await asyncio.wait_for(
            asyncio.wrap_future(self.puller.memory.settled(self.into(0, self.target.size))), timeout_s
        )
        usage = self.puller.memory.usage()
        return await self.source.drained(name, timeout_s) and usage.destinations == usage.quarantined == 0


class Sources:
    """Source processes, one per kind, started when first asked for."""

    def __init__(self, folder: Path) -> None:
        self._tls = make_certificates(folder, ["127.0.0.1"])
        self._running: dict[str, ProcessSource] = {}

    def of(self, kind: str) -> ProcessSource:
        if kind not in self._running:
            self._running[kind] = ProcessSource(self.setup(kind))
        return self._running[kind]

    def setup(self, kind: str) -> Setup:
        """The same for both ends."""
        tls = self._tls if kind == "stream" else ()
        return Setup(ARENA_BYTES, tls, ucx=kind == "ucx", path="ucx" if kind == "ucx" else "stream")

    def close(self) -> None:
        for source in self._running.values():
            source.child.close()


KINDS = ["loopback", "stream", "plain", pytest.param("ucx", marks=needs_nixl)]


@asynccontextmanager
async def open_rig(
    kind: str, sources: Sources, target: NDArray[np.uint8] | None = None
) -> AsyncGenerator[Rig]:
    """A puller in this event loop, with `target` or some memory of its own, and a source."""
    if target is None:
        target = np.full(ARENA_BYTES, GUARD, np.uint8)
    if kind == "loopback":
        network = LoopbackNetwork()
        source, puller = LocalSource(network), LoopbackTransport("puller", network)
    else:
        source, puller = sources.of(kind), sources.setup(kind).open("puller")
    arena = puller.register(Memory(target.ctypes.data, target.nbytes, owner=target))
    try:
        yield Rig(source, puller, target, arena)
    finally:
        await puller.close()
