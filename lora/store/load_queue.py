"""Keep the contents that wait for pages, and those that nobody can ask for any more.

Plain bookkeeping without threads, as the residency that it works on: their owner locks both.
"""

from collections.abc import Iterable

from lora.memory.base import Force
from lora.memory.residency import Content, Residency


class LoadQueue:
    """What is to be loaded next, and what is to be dropped. Not thread-safe."""

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._waiting: list[Content] = []  # absent and asked for, the most urgent first
        self._unused: dict[str, Content] = {}  # to be dropped as soon as no plan can name them
        self.is_closed = False

    @property
    def is_empty(self) -> bool:
        """Whether nothing is to be loaded or dropped."""
        return not self._waiting and not self._unused

    @property
    def urgent(self) -> Content | None:
        """The first of the queue, if a live request waits for it."""
        return self._waiting[0] if self._waiting and self._waiting[0].retained else None

    def replace(self, digests: Iterable[str]) -> None:
        """Queue the absent ones of these contents, the most urgent first, in place of what was queued before."""
        found = map(self._residency.find, digests)
        self._waiting = [c for c in found if c is not None and c.run is None and c.failure is None]

    def put_first(self, content: Content) -> None:
        """Queue a content before all others."""
        self._waiting.insert(0, content)

    def drop_later(self, content: Content) -> None:
        """Drop a content with the next `drop_unused`, if nobody can ask for it any more."""
        if not content.wanted:
            self._unused[content.ref.digest] = content

    def drop_unused(self) -> list[str]:
        """Forget the contents that nobody can ask for, as far as they are not in use; return their digests."""
        dropped: list[str] = []
        for digest, content in tuple(self._unused.items()):
            if content.wanted:
                del self._unused[digest]
            elif self._residency.drop_unwanted(content):
                del self._unused[digest]
                dropped.append(digest)
        return dropped

    def grant(self, force: Force) -> list[Content]:
        """Reserve pages for what waits: only the first may displace what live requests use."""
        waiting = [c for c in self._waiting if c.wanted and c.run is None and c.failure is None]
        self._waiting = []
        granted: list[Content] = []
        for content in () if self.is_closed else waiting:
            urgent = content is waiting[0] and content.retained > 0
            if self._residency.reserve(content, force if urgent else min(force, Force.UNUSED)):
                granted.append(content)
            else:
                self._waiting.append(content)
        return granted

    def would_move(self) -> bool:
        """Tell whether the next step would drop something, or find room for the first of the queue."""
        if self._unused or not self._waiting:
            return bool(self._unused)
        content = self._waiting[0]
        return self._residency.could_reserve(content, Force.IDLE if content.retained else Force.UNUSED)

    def close(self) -> None:
        """Empty the queue, and grant nothing more."""
        self.is_closed = True
        self._waiting = []
