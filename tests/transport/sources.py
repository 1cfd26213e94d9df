"""What tests pull from: a source in a process of its own, or in this one. Both hold the same pattern."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

from tests.transport.pattern import content
from transport.base import Address, Memory, Usage
from transport.loopback import LoopbackNetwork, LoopbackTransport
from transport.security import TlsFiles

TOKEN = "a token of the tests"
ROOT = Path(__file__).parents[2]
ANSWER_S = 60.0


class Source(Protocol):
    """A node that holds `content` in its arena and lends spans of it."""

    @property
    def address(self) -> Address: ...

    def publish(self, name: str, spans: Sequence[tuple[int, int]]) -> None: ...

    def withdraw(self, name: str) -> bool: ...

    async def drained(self, name: str, timeout_s: float) -> bool: ...

    def usage(self) -> Usage: ...


@dataclass(frozen=True)
class SourceSettings:
    """How a source process is set up; `launcher` is put before its command line, to place it in a namespace."""

    arena_bytes: int = 65 << 20
    tls: TlsFiles | None = None
    ucx: bool = False
    open_network: bool = False
    host: str = "127.0.0.1"
    port: int = 0
    token: str = TOKEN
    most_hold_s: float = 60.0
    launcher: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


class ProcessSource:
    """A source in another process, which can be stopped and killed."""

    def __init__(self, settings: SourceSettings) -> None:
        self.settings = settings
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [
                    *settings.launcher,
                    sys.executable,
                    "-m",
                    "tests.transport.source_process",
                    str(theirs.fileno()),
                ],
                cwd=ROOT,
                pass_fds=[theirs.fileno()],
                env={"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "OMP_NUM_THREADS": "1", **settings.environment},
            )
        self._control.settimeout(ANSWER_S)
        self._lines = self._control.makefile("rw")
        plain = asdict(settings)
        plain["tls"] = plain["tls"] and [
            str(plain["tls"][part]) for part in ("authority", "certificate", "key")
        ]
        self._say(plain)
        self._address = Address(**self._ask("hello"))

    @property
    def address(self) -> Address:
        return self._address

    def publish(self, name: str, spans: Sequence[tuple[int, int]]) -> None:
        self._ask("publish", name, spans)

    def withdraw(self, name: str) -> bool:
        return self._ask("withdraw", name)

    async def drained(self, name: str, timeout_s: float) -> bool:
        return await asyncio.to_thread(self._ask, "drained", name, timeout_s)

    def scribble(self, offset: int, nbytes: int) -> None:
        self._ask("scribble", offset, nbytes)

    def usage(self) -> Usage:
        return Usage(**self._ask("usage"))

    def cpu_s(self) -> float:
        return self._ask("cpu_s")

    def stop(self) -> None:
        """Freeze it, as a hung machine would be."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a frozen process go on."""
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it without a word."""
        self._process.kill()
        self._process.wait(ANSWER_S)
        self._hang_up()

    def close(self) -> None:
        """End it in order."""
        if self._process.poll() is None:
            self._ask("close")
            self._hang_up()
            code = self._process.wait(ANSWER_S)
            assert code == 0, f"the source process ended with {code}"

    def _hang_up(self) -> None:
        self._lines.close()
        self._control.close()

    def _say(self, what: object) -> None:
        self._lines.write(json.dumps(what) + "\n")
        self._lines.flush()

    def _ask(self, *command: object):  # noqa: ANN202  (whatever the command answers)
        self._say(command)
        return json.loads(self._lines.readline())


class LocalSource:
    """A loopback transport in this process."""

    def __init__(self, network: LoopbackNetwork, arena_bytes: int = 65 << 20) -> None:
        self._bytes = content(0, arena_bytes)
        self.transport = LoopbackTransport("source", network)
        self._arena = self.transport.register(Memory(self._bytes.ctypes.data, arena_bytes, owner=self._bytes))
        self._withdrawn: dict[str, Future[None]] = {}

    @property
    def address(self) -> Address:
        return self.transport.address

    def publish(self, name: str, spans: Sequence[tuple[int, int]]) -> None:
        self.transport.publish(name, [self._arena.region(offset, nbytes) for offset, nbytes in spans])

    def withdraw(self, name: str) -> bool:
        self._withdrawn[name] = self.transport.withdraw(name)
        return self._withdrawn[name].done()

    async def drained(self, name: str, timeout_s: float) -> bool:
        try:
            await asyncio.wait_for(asyncio.wrap_future(self._withdrawn[name]), timeout_s)
        except TimeoutError:
            return False
        return True

    def usage(self) -> Usage:
        return self.transport.usage()
