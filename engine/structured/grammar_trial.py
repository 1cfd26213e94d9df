"""Try what a form costs to compile, in a process with limits, before this process compiles it."""

from typing import TypedDict

from engine.structured import grammar_worker
from engine.text.bounded_process import BeyondLimits, BoundedProcess


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

    def __init__(self) -> None:
        """Start nothing yet."""
        self._process = BoundedProcess("try a form", grammar_worker.__file__)

    def refusal(self, grammar: str) -> str:
        """Return why a grammar in llguidance's notation cannot be compiled within the limits, "" if it can.

        Raises EngineError if no process can be started.
        """
        try:
            return str(self._process.ask({"grammar": grammar, "limits": LIMITS}))
        except BeyondLimits as error:
            return f"it {error}"

    def close(self) -> None:
        """End the process, whatever it tries; a later trial starts another."""
        self._process.close()
