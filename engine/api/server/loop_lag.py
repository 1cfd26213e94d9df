"""Measure how late the event loop answers: what holds it up holds up every stream and every health check."""

import asyncio
import time
from collections.abc import Callable

_TICK_S = 0.01


class LoopLag:
    """Wakes every `tick_s` and tells `stalled` how much later than that it was, in seconds."""

    def __init__(
        self,
        stalled: Callable[[float], None],
        clock: Callable[[], float] = time.monotonic,
        tick_s: float = _TICK_S,
    ) -> None:
        self._stalled = stalled
        self._clock = clock
        self._tick_s = tick_s
        self._due_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin to measure the running event loop."""
        self._due_s = self._clock() + self._tick_s
        self._timer = asyncio.get_running_loop().call_later(self._tick_s, self._wake)

    def stop(self) -> None:
        """Measure no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def tick(self) -> None:
        """Tell how late this call is, and expect the next one."""
        now_s = self._clock()
        if now_s > self._due_s:
            self._stalled(now_s - self._due_s)
        self._due_s = now_s + self._tick_s

    def _wake(self) -> None:
        self.tick()
        self._timer = asyncio.get_running_loop().call_later(self._tick_s, self._wake)
