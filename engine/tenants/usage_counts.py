"""Count what tenants use, by day and adapter, until somebody keeps it."""

import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import NamedTuple

SECONDS_A_DAY = 86_400


class UsageKey(NamedTuple):
    """What is counted together: a day in UTC as 2026-11-30, a tenant, and an adapter or the base model by its name."""

    day: str
    tenant: str
    adapter: str


class UsageCount(NamedTuple):
    """Requests that were answered or given up, the tokens of these, and requests that were refused."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    refusals: int = 0

    def plus(self, other: "UsageCount") -> "UsageCount":
        """Return both together."""
        return UsageCount(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


NOTHING_USED = UsageCount()


class UsageCounts:
    """What was counted and is not kept yet. Any thread may call it. It counts nothing while nobody keeps it."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._counts: dict[UsageKey, UsageCount] = {}
        self.is_kept = False

    def ended(self, tenant: str, adapter: str, prompt: int, cached: int, completion: int) -> None:
        """Count a request that has ended, and its tokens."""
        self._add(tenant, adapter, UsageCount(1, prompt, min(cached, prompt), completion))

    def refused(self, tenant: str, adapter: str) -> None:
        """Count a request that was refused; without a name where nobody knows what it asked for."""
        self._add(tenant, adapter, UsageCount(refusals=1))

    def take(self) -> Mapping[UsageKey, UsageCount]:
        """Return what was counted, and begin anew."""
        with self._lock:
            taken, self._counts = self._counts, {}
        return taken

    def put_back(self, counts: Mapping[UsageKey, UsageCount]) -> None:
        """Count again what was taken and could not be kept."""
        with self._lock:
            for key, count in counts.items():
                self._counts[key] = self._counts.get(key, NOTHING_USED).plus(count)

    def today(self, days_ago: int = 0) -> str:
        """Return a day as it is written here."""
        return datetime.fromtimestamp(self._clock() - days_ago * SECONDS_A_DAY, UTC).date().isoformat()

    def _add(self, tenant: str, adapter: str, count: UsageCount) -> None:
        if self.is_kept:
            self.put_back({UsageKey(self.today(), tenant, adapter): count})
