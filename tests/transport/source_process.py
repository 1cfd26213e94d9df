"""The source that `sources.ProcessSource` steers."""

import asyncio
import json
import socket
import sys
from concurrent.futures import Future
from concurrent.futures import TimeoutError as WaitTimeout
from dataclasses import asdict

from tests.transport.node_setup import Setup
from tests.transport.pattern import content
from transport.base import Memory


class SteeredSource:
    """A transport whose arena holds the pattern, and the commands it understands."""

    def __init__(self, setup: Setup) -> None:
        self._bytes = content(0, setup.arena_bytes)
        self._transport = setup.open("source")
        self._arena = self._transport.register(
            Memory(self._bytes.ctypes.data, self._bytes.nbytes, owner=self._bytes)
        )
        self._withdrawn: dict[str, Future[None]] = {}

    def hello(self) -> dict[str, object]:
        """Where it listens."""
        return asdict(self._transport.address)

    def publish(self, name: str, spans: list[list[int]]) -> None:
        """Publish spans of the arena."""
        self._transport.memory.publish(name, [self._arena.region(offset, nbytes) for offset, nbytes in spans])

    def withdraw(self, name: str) -> bool:
        """Publish a name no more; whether its pages are free at once."""
        self._withdrawn[name] = self._transport.memory.withdraw(name)
        return self._withdrawn[name].done()

    def drained(self, name: str, timeout_s: float) -> bool:
        """Whether a withdrawn name's pages became free in time."""
        try:
            self._withdrawn[name].result(timeout_s)
        except WaitTimeout:
            return False
        return True

    def scribble(self, offset: int, nbytes: int) -> None:
        """Use the pages for something else."""
        self._bytes[offset : offset + nbytes] = 0xEE

    def usage(self) -> dict[str, object]:
        """What the transport holds."""
        return asdict(self._transport.memory.usage())

    def close(self) -> None:
        """Close the transport."""
        asyncio.run(self._transport.close())


def main(control: socket.socket) -> None:
    """Obey until the other end hangs up."""
    with control, control.makefile("rw") as lines:
        steered = SteeredSource(Setup(**json.loads(lines.readline())))
        commands = {
            "hello": steered.hello,
            "publish": steered.publish,
            "withdraw": steered.withdraw,
            "drained": steered.drained,
            "scribble": steered.scribble,
            "usage": steered.usage,
            "close": steered.close,
        }
        for line in lines:
            command, *arguments = json.loads(line)
            lines.write(json.dumps(commands[command](*arguments)) + "\n")
            lines.flush()


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
