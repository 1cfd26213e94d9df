"""The puller that `pullers.ProcessPuller` steers."""

import asyncio
import json
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict

import numpy as np

from tests.transport.node_setup import Setup
from tests.transport.pattern import content
from transport.base import Address, Memory, Region
from transport.errors import TransportError

GUARD = 0xA5
GLANCE_S = 0.01


class SteeredPuller:
    """A transport with memory for bytes, and the commands it understands. One pull at a time runs in the background."""

    def __init__(self, setup: Setup) -> None:
        self._target = np.full(setup.arena_bytes, GUARD, np.uint8)
        self._transport = setup.open("puller")
        self._arena = self._transport.register(
            Memory(self._target.ctypes.data, self._target.nbytes, owner=self._target)
        )
        self._pulling: asyncio.Task[dict[str, object]] | None = None

    async def begin(self, host: str, port: int, name: str, nbytes: int, timeout_s: float) -> None:
        """Start to fetch `name` to the start of that memory, as adapters are."""
        into = self._arena.region(0, nbytes)
        self._pulling = asyncio.ensure_future(self._pull(Address(host, port), name, into, timeout_s))

    async def first_byte(self, timeout_s: float) -> bool:
        """Whether a byte landed in time. Nobody announces bytes: the memory has to be looked at."""
        until_s = time.monotonic() + timeout_s
        while self._target[0] == GUARD and time.monotonic() < until_s:
            await asyncio.sleep(GLANCE_S)
        return bool(self._target[0] != GUARD)

    async def result(self, timeout_s: float) -> dict[str, object]:
        """How the pull ended: the error's name, or nothing, and the seconds it took."""
        assert self._pulling is not None
        return await asyncio.wait_for(self._pulling, timeout_s)

    async def settled(self, timeout_s: float) -> bool:
        """Whether, in time, nothing can land there any more."""
        settled = asyncio.wrap_future(
            self._transport.memory.settled(self._arena.region(0, self._target.size))
        )
        try:
            await asyncio.wait_for(asyncio.shield(settled), timeout_s)
        except TimeoutError:
            return False
        return True

    async def exact(self, offset: int, nbytes: int) -> bool:
        """Whether the start of the memory holds the pattern from `offset` on, and nothing else was touched."""
        beside = self._target[nbytes:]
        return bool((self._target[:nbytes] == content(offset, nbytes)).all() and (beside == GUARD).all())

    async def reuse(self) -> None:
        """Use the memory for something else."""
        self._target[:] = GUARD

    async def untouched(self) -> bool:
        """Whether nothing was written since `reuse`."""
        return bool((self._target == GUARD).all())

    async def usage(self) -> dict[str, object]:
        """What the transport holds."""
        return asdict(self._transport.memory.usage())

    async def close(self) -> None:
        """Close the transport."""
        await self._transport.close()

    async def _pull(self, peer: Address, name: str, into: Region, timeout_s: float) -> dict[str, object]:
        start_s = time.monotonic()
        error = None
        try:
            await self._transport.fetch(peer, name, [into], timeout_s)
        except TransportError as raised:
            error = type(raised).__name__
            print(f"{name}: {error}: {raised}", file=sys.stderr)
        return {"error": error, "took_s": time.monotonic() - start_s}


def main(control: socket.socket) -> None:
    """Obey until the other end hangs up."""
    asyncio.run(_obey(control))


async def _obey(control: socket.socket) -> None:
    reader, writer = await asyncio.open_connection(sock=control)
    steered = SteeredPuller(Setup(**json.loads(await reader.readline())))
    commands: dict[str, Callable[..., Awaitable[object]]] = {
        "begin": steered.begin,
        "first_byte": steered.first_byte,
        "result": steered.result,
        "settled": steered.settled,
        "exact": steered.exact,
        "reuse": steered.reuse,
        "untouched": steered.untouched,
        "usage": steered.usage,
        "close": steered.close,
    }
    while line := await reader.readline():
        command, *arguments = json.loads(line)
        writer.write(json.dumps(await commands[command](*arguments)).encode() + b"\n")
        await writer.drain()
    writer.close()


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
