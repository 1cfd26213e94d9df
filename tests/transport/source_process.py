"""A source in a process of its own, told what to do by JSON lines over the socket that its argument numbers."""

import asyncio
import json
import socket
import sys
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as WaitTimeout
from dataclasses import asdict
from pathlib import Path

from tests.transport.pattern import content
from transport.base import Address, Memory, Region
from transport.door import Door
from transport.network import NetworkOptions, NetworkTransport
from transport.security import Security, TlsFiles
from transport.stream import StreamDoor
from transport.ucx import UcxDoor


class Steered:
    """A transport whose arena holds the pattern, and the commands it understands."""

    def __init__(self, settings: dict) -> None:
        self._bytes = content(0, settings["arena_bytes"])
        tls = _tls(settings["tls"])
        security = Security(settings["token"], tls, settings["open_network"])
        listen = Address(settings["host"], settings["port"])
        doors: list[Door] = [StreamDoor()]
        if settings["ucx"]:
            doors.insert(0, UcxDoor("source", settings["open_network"]))
        options = NetworkOptions(security, listen, most_hold_s=settings["most_hold_s"])
        self._transport = NetworkTransport("source", options, doors)
        self._arena = self._transport.register(
            Memory(self._bytes.ctypes.data, self._bytes.nbytes, owner=self._bytes)
        )
        self._withdrawn: dict[str, Future[None]] = {}

    def hello(self) -> dict:
        """Where it listens."""
        return asdict(self._transport.address)

    def publish(self, name: str, spans: list[list[int]]) -> None:
        """Lend spans of the arena."""
        self._transport.publish(name, [self._region(offset, nbytes) for offset, nbytes in spans])

    def withdraw(self, name: str) -> bool:
        """Lend a name no more; whether its pages are free at once."""
        self._withdrawn[name] = self._transport.withdraw(name)
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

    def usage(self) -> dict:
        """What the transport holds."""
        return asdict(self._transport.usage())

    def cpu_s(self) -> float:
        """Processor time used so far."""
        return time.process_time()

    def close(self) -> None:
        """Close the transport."""
        asyncio.run(self._transport.close())

    def _region(self, offset: int, nbytes: int) -> Region:
        return self._arena.region(offset, nbytes)


def _tls(files: list[str] | None) -> TlsFiles | None:
    if files is None:
        return None
    authority, certificate, key = map(Path, files)
    return TlsFiles(authority, certificate, key)


def main(control: socket.socket) -> None:
    """Obey until the other end hangs up."""
    with control.makefile("rw") as lines:
        steered = Steered(json.loads(lines.readline()))
        commands = {
            "hello": steered.hello,
            "publish": steered.publish,
            "withdraw": steered.withdraw,
            "drained": steered.drained,
            "scribble": steered.scribble,
            "usage": steered.usage,
            "cpu_s": steered.cpu_s,
            "close": steered.close,
        }
        for line in lines:
            command, *arguments = json.loads(line)
            lines.write(json.dumps(commands[command](*arguments)) + "\n")
            lines.flush()


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
