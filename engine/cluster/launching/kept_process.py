"""Keep one member of a cluster running as a process, and end it so that what it does is finished first.

A process that ends is started again, after a pause that grows while it keeps ending. It never outlives its keeper.
"""

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from engine.cluster.launching.member_lines import Part

_LEAST_PAUSE_S, _MOST_PAUSE_S = 0.5, 15.0
_STEADY_S = 30.0  # a process that ran so long is started again at once
_GRACE_S = 10.0  # beyond the time to drain
_FLUSH_S = 1.0  # for the last lines of a process that has ended
_MOST_LINE_BYTES = 1 << 20
_TETHER = Path(__file__).with_name("tether.py")
NODE_NICENESS = 5  # where a machine runs a whole cluster: who refuses and relays goes before who computes
_log = logging.getLogger(__name__)


def serve_command(part: Part) -> tuple[str, ...]:
    """Return the command that runs a member."""
    return (sys.executable, "-m", part.module, *part.arguments)


def tethered(command: tuple[str, ...], niceness: int = 0) -> tuple[str, ...]:
    """Return what runs a command as a child that ends with this thread, and goes behind others by `niceness`."""
    return (sys.executable, "-I", str(_TETHER), str(os.getpid()), str(niceness), *command)


class KeptProcess:
    """A command that runs until it is told to end. Used on the event loop of one thread, which lives as long.

    With `told` every line that the process writes goes there; otherwise it writes where this one does.
    """

    def __init__(
        self,
        name: str,
        command: tuple[str, ...],
        environment: Mapping[str, str] = os.environ,
        folder: Path | None = None,
        told: Callable[[str], None] | None = None,
        niceness: int = 0,
    ) -> None:
        """Start nothing yet."""
        self.name, self._niceness = name, niceness
        self.last_code: int | None = None
        self._command, self._environment, self._folder, self._told = command, environment, folder, told
        self._process: asyncio.subprocess.Process | None = None
        self._ending = asyncio.Event()

    @property
    def pid(self) -> int | None:
        """Return the process that runs now, if one does."""
        return self._process.pid if self._process is not None else None

    async def run(self) -> None:
        """Start the command, and start it again whenever it ends, until it is told to end."""
        pause_s = _LEAST_PAUSE_S
        while not self._ending.is_set():
            began_s = time.monotonic()
            code = await self._run_once()
            if self._ending.is_set():
                return
            pause_s = (
                _LEAST_PAUSE_S if time.monotonic() - began_s > _STEADY_S else min(_MOST_PAUSE_S, 2 * pause_s)
            )
            _log.warning("%s has ended with %d: it is started again in %.1f s", self.name, code, pause_s)
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._ending.wait()

    def start_no_more(self) -> None:
        """Leave the process as it is, and start no other when it ends."""
        self._ending.set()

    async def end(self, drain_s: float) -> None:
        """Have the process drain, and end it if it takes much longer than that."""
        self.start_no_more()
        process = self._process
        if process is None:
            return
        self._signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(drain_s + _GRACE_S):
                await process.wait()
        except TimeoutError:
            self.kill()

    def kill(self) -> None:
        """End the process at once."""
        self.start_no_more()
        self._signal(signal.SIGKILL)

    async def _run_once(self) -> int:
        pipe = asyncio.subprocess.PIPE if self._told else None
        errors = asyncio.subprocess.STDOUT if self._told else None
        process = await asyncio.create_subprocess_exec(
            *tethered(self._command, self._niceness), env=self._environment, cwd=self._folder, start_new_session=True,
            stdin=asyncio.subprocess.DEVNULL, limit=_MOST_LINE_BYTES, stdout=pipe, stderr=errors,
        )  # fmt: skip
        self._process = process
        reading = asyncio.create_task(self._read(process.stdout))
        self.last_code = await process.wait()
        self._process = None
        await asyncio.wait([reading], timeout=_FLUSH_S)  # a process that it started may still write
        reading.cancel()
        return self.last_code

    async def _read(self, lines: asyncio.StreamReader | None) -> None:
        while lines is not None and self._told is not None:
            try:
                line = await lines.readline()
            except ValueError:  # longer than may be: it is left out
                continue
            if not line:
                return
            self._told(line.decode(errors="replace").rstrip("\n"))

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.send_signal(number)
