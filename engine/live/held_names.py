"""Hold names: until when each takes no requests, on the monotonic clock."""

import time


class HeldNames:
    """Names that were held, or released before their time.

    What is over is forgotten `remembered_s` later, as long as a hold may last: whoever was away till then, and still
    holds a name, can be told of its release.
    """

    def __init__(self, remembered_s: float = 0.0) -> None:
        """Hold none."""
        self._until_s: dict[str, float] = {}
        self._remembered_s = remembered_s

    def hold(self, name: str, seconds: float) -> None:
        """Hold a name for so long from now on; 0 releases it."""
        now_s = time.monotonic()
        oldest_s = now_s - self._remembered_s
        self._until_s = {each: until for each, until in self._until_s.items() if until > oldest_s}
        self._until_s[name] = now_s + seconds

    def left_s(self, name: str) -> float | None:
        """Return for how long a name is still held; None if it is not."""
        left_s = self._until_s.get(name, 0.0) - time.monotonic()
        return left_s if left_s > 0 else None

    def told(self) -> dict[str, float]:
        """Return for how long each name is still held, 0 for those that are not any more."""
        now_s = time.monotonic()
        return {name: max(0.0, until_s - now_s) for name, until_s in self._until_s.items()}
