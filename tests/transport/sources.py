"""What tests pull from: a source in a process of its own, or in this one. Both hold the same pattern."""

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Protocol

from tests.transport.child import Child
from tests.transport.node_setup import MIB, Setup
from tests.transport.pattern import content
from tests.transport.source_process import main
from transport.base import Address, Memory, TransportUsage
from transport.loopback import LoopbackNetwork, LoopbackTransport


class Source(Protocol):
    """A node that holds `content` in its arena and publishes spans of it."""

    @property
    def address(self) -> Address: ...

    def publish(self, name: str, spans: Sequence[tuple[int, int]]) -> None: ...

    def withdraw(self, name: str) -> bool: ...

    async def drained(self, name: str, timeout_s: float) -> bool: ...

    def usage(self) -> TransportUsage: ...


class ProcessSource:
    """A source in another process; `child` can be stopped and killed."""

    def __init__(
        self, setup: Setup, launcher: tuple[str, ...] = (), environment: Mapping[str, str] | None = None
    ) -> None:
        self.child = Child(main, setup.as_json(), launcher, environment or {})
        self._address = Address(**self.child.ask("hello"))

    @property
    def address(self) -> Address:
        return self._address

    def publish(self, name: str, spans: Sequence[tuple[int, int]]) -> None:
        self.child.ask("publish", name, spans)

    def withdraw(self, name: str) -> bool:
        return self.child.ask("withdraw", name)

    async def drained(self, name: str, timeout_s: float) -> bool:
        return await asyncio.to_thread(self.is_drained, name, timeout_s)

    def is_drained(self, name: str, timeout_s: float) -> bool:
        return self.child.ask("drained", name, timeout_s)

    def scribble(self, offset: int, nbytes: int) -> None:
        self.child.ask("scribble", offset, nbytes)

    def usage(self) -> TransportUsage:
        return TransportUsage(**self.child.ask("usage"))


class LocalSource:
    """A loopback transport in this process."""

    def __init__(self, network: LoopbackNetwork, arena_bytes: int = 65 * MIB) -> None:
        self._bytes = content(0, arena_bytes)
        self.transport = LoopbackTransport("source", network)
        self._arena = self.transport.register(Memory(self._bytes.ctypes.data, arena_bytes, owner=self._bytes))
        self._withdrawn: dict[str, Future[None]] = {}

    @property
    def address(self) -> Address:
        return self.transport.address

    def publish(self, name: str, spans: Sequence[tuple[int, int]]) -> None:
        self.transport.memory.publish(name, [self._arena.region(offset, nbytes) for offset, nbytes in spans])

    def withdraw(self, name: str) -> bool:
        self._withdrawn[name] = self.transport.memory.withdraw(name)
        return self._withdrawn[name].done()

    async def drained(self, name: str, timeout_s: float) -> bool:
        try:
            await asyncio.wait_for(asyncio.wrap_future(self._withdrawn[name]), timeout_s)
        except TimeoutError:
            return False
        return True

    def usage(self) -> TransportUsage:
        return self.transport.memory.usage()
