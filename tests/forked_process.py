"""A process without the seconds in which Python imports its libraries.

The first one starts a process that imports them and does nothing else; each is forked from that. What an operator
starts, `python -m engine.serve`, is tried by test_cluster, test_server, test_hung_stop and the examples.
"""

import atexit
import multiprocessing
import os
import signal
import subprocess
from collections.abc import Callable, Mapping
from io import TextIOWrapper
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        "engine.serve",
        "engine.assembly.assembly",  # a role is imported once it is known
        "engine.async_engine",
        "engine.cluster.roles.node_role",
        "tests.transport.forger_process",
        "tests.transport.puller_process",
        "tests.transport.source_process",
    ]
)


class ForkedProcess:
    """`main(*arguments)` in a process of its own, and what it prints; errors go to `log` where there is one."""

    def __init__(
        self,
        main: Callable[..., int | None],
        arguments: tuple[Any, ...],
        environment: Mapping[str, str],
        log: Path | None = None,
    ) -> None:
        read, write = _FORKS.Pipe(duplex=False)
        with read, write:
            told = (main, arguments, dict(environment), write, log)
            self._process = _FORKS.Process(target=_be, args=told, daemon=True)
            self._process.start()
            self.stdout: TextIOWrapper = os.fdopen(os.dup(read.fileno()))
        atexit.register(self.kill)  # a halted one hears nothing else

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
            raise subprocess.TimeoutExpired(self._process.name, timeout_s)
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it, unless it has ended."""
        self.send_signal(signal.SIGKILL)


def _be(
    main: Callable[..., int | None],
    arguments: tuple[Any, ...],
    environment: dict[str, str],
    printed: Connection,
    log: Path | None,
) -> None:
    """Be the process."""
    os.dup2(printed.fileno(), 1)
    printed.close()
    if log is not None:
        with log.open("wb") as errors:
            os.dup2(errors.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    raise SystemExit(main(*arguments))
