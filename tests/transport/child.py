"""Child: a program in a process of its own, told what to do by JSON lines over a socket."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.forked_process import ForkedProcess

ROOT = Path(__file__).parents[2]
ANSWER_S = 120.0


class Child:
    """`main` with a socket in a process; `launcher` is put before its command line, to place it in a namespace."""

    def __init__(
        self,
        main: Callable[[socket.socket], None],
        settings: object,
        launcher: tuple[str, ...],
        environment: Mapping[str, str],
    ) -> None:
        self._control, theirs = socket.socketpair()
        with theirs:
            given = {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "OMP_NUM_THREADS": "1", **environment}
            if launcher:
                self._process = subprocess.Popen(
                    [*launcher, sys.executable, "-m", main.__module__, str(theirs.fileno())],
                    cwd=ROOT,
                    pass_fds=[theirs.fileno()],
                    env=given,
                )
            else:
                self._process = ForkedProcess(main, (theirs,), given)
        self._control.settimeout(ANSWER_S)
        self._lines = self._control.makefile("rw")
        self.say(settings)

    def say(self, what: object) -> None:
        """Send one line."""
        self._lines.write(json.dumps(what) + "\n")
        self._lines.flush()

    def ask(self, *command: object):  # noqa: ANN201  (whatever the command answers)
        """Send a command and wait for its answer."""
        self.say(command)
        return json.loads(self._lines.readline())

    def stop(self) -> None:
        """Freeze it, as a hung machine would be; it has stopped once this returns."""
        self._process.send_signal(signal.SIGSTOP)
        while not self._is_halted():  # its threads do not stop at once
            time.sleep(0.01)

    def resume(self) -> None:
        """Let a frozen process go on."""
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it without a word; nothing happens if it has ended."""
        self._process.kill()
        self._process.wait(ANSWER_S)
        self._hang_up()

    def close(self) -> None:
        """End it in order, unless it has been killed."""
        if self._process.poll() is None:
            self.ask("close")
            self._hang_up()
            code = self._process.wait(ANSWER_S)
            assert code == 0, f"the process ended with {code}"

    def _is_halted(self) -> bool:
        tasks = Path(f"/proc/{self._process.pid}/task").iterdir()
        return all((each / "stat").read_text().rpartition(")")[2].split()[0] == "T" for each in tasks)

    def _hang_up(self) -> None:
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._lines.close()
        self._control.close()
