"""Try what a form costs to compile, with limits on processor time and memory, before this process compiles it.

One process of `engine.structured.grammar_worker` does the work. It is started when first needed, and again after a
form has used up its limits. It ends with its owner: its socket closes then.
"""

import json
import signal
import threading
from pathlib import Path
from typing import TypedDict

from engine.structured import grammar_worker
from engine.text.worker_process import WorkerProcess

_MOST_CPU_S = 2.0
_MOST_S = 30.0  # for an answer, on a machine that does much else
_MOST_BYTES = 1 << 30


class _Limits(TypedDict):
    initial_lexer_fuel: int
    step_lexer_fuel: int
    step_max_items: int
    max_lexer_states: int
    max_grammar_size: int
    verbose_errors: bool


LIMITS = _Limits(
    initial_lexer_fuel=500_000, step_lexer_fuel=100_000, step_max_items=20_000, max_lexer_states=50_000,
    max_grammar_size=100_000, verbose_errors=False,
)  # fmt: skip
"""What llguidance itself is to bound: some milliseconds in a step."""


class GrammarTrial:
    """Tries one grammar at a time, from any thread."""

    def __init__(self, most_cpu_s: float = _MOST_CPU_S, most_bytes: int = _MOST_BYTES) -> None:
        """Start nothing yet."""
        self._most_cpu_s, self._most_bytes = most_cpu_s, most_bytes
        self._lock = threading.Lock()
        self._worker: WorkerProcess | None = None

    def refusal(self, grammar: str) -> str:
        """Return why a grammar in llguidance's notation cannot be compiled within the limits, "" if it can.

        Raises EngineError if no process can be started.
        """
        job = json.dumps({"grammar": grammar, "limits": LIMITS})
        with self._lock:
            if self._worker is None or not self._worker.is_alive():
                self._worker = self._start()
            try:
                self._worker.send(job.encode())
                return str(json.loads(self._worker.receive()))
            except OSError:
                reason = self._reason(self._worker.end())
                self._worker = None
                return reason

    def close(self) -> None:
        """End the process, whatever it tries; a later trial starts another."""
        if (worker := self._worker) is not None:
            worker.kill()

    def _start(self) -> WorkerProcess:
        program, limits = [str(Path(grammar_worker.__file__))], [self._most_cpu_s, self._most_bytes]
        return WorkerProcess(self, "try a form", program, limits, _MOST_S)

    def _reason(self, code: int | None) -> str:
        """Say what was wrong with a form whose process has ended with `code`, or had to be ended."""
        if code == -signal.SIGPROF:
            return f"it takes more than {self._most_cpu_s:g} s of processor time"
        if code is None:
            return f"it is not compiled within {_MOST_S:g} s"
        return f"it takes more than {self._most_bytes >> 20} MiB, or ends the compiler"
