"""Await the compilation of forms, off the event loop and never beyond a deadline."""

from engine.errors import NotInTime
from engine.structured.grammar import Grammar
from engine.structured.grammar_cache import GrammarCache
from engine.waiting.task_pool import TaskPool
from scheduler.request import SamplingParams

_THREADS = 2
_COMPILE_S = 10.0
_MOST_QUEUED = 256


class GrammarPool:
    """Threads that compile. Used on one event loop."""

    def __init__(self, cache: GrammarCache, timeout_s: float = _COMPILE_S) -> None:
        """Compile into `cache`, each form for `timeout_s` at most."""
        self._cache, self._timeout_s = cache, timeout_s
        self._pool = TaskPool("structured output", _THREADS, timeout_s, _MOST_QUEUED)

    async def compile(self, params: SamplingParams) -> Grammar | None:
        """Return the grammar of the form that the text is to have, if any.

        Raises InvalidParameter for a form that cannot be had, or not in time; NotInTime if others keep the threads.
        """
        asked = params.structured_outputs
        if asked is None:
            return None
        if (known := self._cache.known(asked)) is not None:
            return known
        began: list[bool] = []

        def work() -> Grammar:
            began.append(True)
            return self._cache.compile(asked)

        try:
            return await self._pool.run(work)
        except NotInTime:
            if not began:
                raise
            raise asked.refusal(
                f"it takes over {self._timeout_s:g} s to compile: give a simpler one"
            ) from None

    def close(self) -> None:
        """Take no more work; nobody waits for what runs."""
        self._pool.close()
        self._cache.close()
