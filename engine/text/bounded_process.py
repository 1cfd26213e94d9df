"""Have jobs done in a process with limits on processor time and memory, and start another when it has used them up.

It is started when first needed. It ends with its owner: its socket closes then.
"""

import json
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.errors import EngineError
from engine.text.worker_process import WorkerProcess

MOST_CPU_S = 2.0
MOST_BYTES = 1 << 30
_MOST_S = 30.0  # for an answer, on a machine that does much else


class BeyondLimits(EngineError):
    """A job that ended its process, or was not done in time; says what became of it."""


class BoundedProcess:
    """Does one job at a time, from any thread, by a program that calls `bounded_jobs.serve_jobs`."""

    def __init__(
        self, purpose: str, program: str | None, most_cpu_s: float = MOST_CPU_S, most_bytes: int = MOST_BYTES
    ) -> None:
        """Start nothing yet. `program` is the `__file__` of a module."""
        assert program is not None, "a module has a file"
        self.most_cpu_s, self.most_bytes = most_cpu_s, most_bytes
        self._purpose, self._program = purpose, str(Path(program))
        self._lock = threading.Lock()
        self._worker: WorkerProcess | None = None

    def ask(self, job: Mapping[str, object]) -> Any:
        """Return the answer to a job. Raises BeyondLimits; EngineError if no process can be started."""
        content = json.dumps(job).encode()
        with self._lock:
            if self._worker is None or not self._worker.is_alive():
                limits = [self.most_cpu_s, self.most_bytes]
                self._worker = WorkerProcess(self, self._purpose, [self._program], limits, _MOST_S)
            try:
                self._worker.send(content)
                return json.loads(self._worker.receive())
            except OSError:
                reason = self._reason(self._worker.end())
                self._worker = None
                raise BeyondLimits(reason) from None

    def close(self) -> None:
        """End the process, whatever it does; a later job starts another."""
        if (worker := self._worker) is not None:
            worker.kill()

    def _reason(self, code: int | None) -> str:
        """Say what became of a job whose process has ended with `code`, or had to be ended."""
        if code == -signal.SIGPROF:
            return f"takes more than {self.most_cpu_s:g} s of processor time"
        return (
            f"gives nothing within {_MOST_S:g} s" if code is None else f"ends the process to {self._purpose}"
        )
