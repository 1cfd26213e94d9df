"""Virtual time. Nothing here waits: the clock jumps to whatever is due next."""

import heapq
from collections.abc import Callable

Action = Callable[[], None]


class Clock:
    """Runs actions in order of their time, those of one time in the order in which they were asked for."""

    def __init__(self) -> None:
        self.now = 0.0
        self._asked = 0
        self._due: list[tuple[float, int, Action]] = []

    def at(self, time_s: float, action: Action) -> None:
        """Run `action` at `time_s`, which is not past."""
        assert time_s >= self.now, f"{time_s} is past at {self.now}"
        self._asked += 1
        heapq.heappush(self._due, (time_s, self._asked, action))

    def after(self, delay_s: float, action: Action) -> None:
        """Run `action` `delay_s` from now."""
        self.at(self.now + delay_s, action)

    def run(self, until_s: float, after_each: Action | None = None) -> None:
        """Run all that is due by `until_s`, and `after_each` after each action."""
        while self._due and self._due[0][0] <= until_s:
            self.now, _, action = heapq.heappop(self._due)
            action()
            if after_each is not None:
                after_each()
        self.now = max(self.now, until_s)
