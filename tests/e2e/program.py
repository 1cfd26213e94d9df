"""A server in a process of its own, without the seconds in which Python imports its libraries.

The first one starts a process that imports them and does nothing else; each server is forked from it. What an operator
starts, `python -m engine.serve`, is tried by test_cluster, test_server, test_hung_stop and the examples.
"""

import multiprocessing
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from io import TextIOWrapper
from multiprocessing.connection import Connection
from pathlib import Path

from engine.serve import main

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["engine.serve"])


class Program:
    """`python -m engine.serve` with `arguments`, and what it prints; errors go to `log` where there is one."""

    def __init__(
        self, arguments: Sequence[str], environment: Mapping[str, str], log: Path | None = None
    ) -> None:
        read, write = _FORKS.Pipe(duplex=False)
        with read, write:
            told = (tuple(arguments), dict(environment), write, log)
            self._process = _FORKS.Process(target=_be, args=told, daemon=True)
            self._process.start()
            self.stdout: TextIOWrapper = os.fdopen(os.dup(read.fileno()))

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout_s: float) -> int:
        """The exit code, once it has ended. Raises TimeoutExpired."""
        self._process.join(timeout_s)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("engine.serve", timeout_s)
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it, unless it has ended."""
        self.send_signal(signal.SIGKILL)


def _be(
    arguments: tuple[str, ...], environment: dict[str, str], printed: Connection, log: Path | None
) -> None:
    """Be the process."""
    os.dup2(printed.fileno(), 1)
    printed.close()
    if log is not None:
        with log.open("wb") as errors:
            os.dup2(errors.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    raise SystemExit(main(arguments))
