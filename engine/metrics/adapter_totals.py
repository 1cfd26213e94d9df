"""Sum what requests did, by adapter: of the most recent ones each for itself, of all others together.

So metrics stay finite however many adapters come and go, and nothing is lost: all sums together are the true ones. It
may not know how metrics are written.
"""

import threading
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

OTHER = "(other)"
"""The label of the adapters that have no series of their own; no adapter can have this name."""

TTFT_BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TBT_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5)


@dataclass(slots=True)
class Times:
    """Durations by the first of `bounds_s` that is not below them; `counts` has one more, for those beyond all."""

    bounds_s: Sequence[float]
    counts: list[int] = field(default_factory=list[int])
    sum_s: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds_s) + 1)

    def observe(self, seconds: float) -> None:
        """Count a duration."""
        self.counts[bisect_left(self.bounds_s, seconds)] += 1
        self.sum_s += seconds

    def add(self, other: "Times") -> None:
        """Count what `other` has counted as well."""
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.sum_s += other.sum_s

    def copy(self) -> "Times":
        """Return the same counts, which stay as they are."""
        return Times(self.bounds_s, list(self.counts), self.sum_s)


@dataclass(slots=True)
class Totals:
    """What the requests of one label amount to."""

    started: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    finished: dict[str, int] = field(default_factory=dict[str, int])  # by what ended them
    ttft: Times = field(default_factory=lambda: Times(TTFT_BOUNDS_S))
    tbt: Times = field(default_factory=lambda: Times(TBT_BOUNDS_S))

    def finish(self, reason: str, count: int = 1) -> None:
        """Count requests that ended."""
        self.finished[reason] = self.finished.get(reason, 0) + count

    def add(self, other: "Totals") -> None:
        """Count what `other` has counted as well."""
        self.started += other.started
        self.prompt_tokens += other.prompt_tokens
        self.output_tokens += other.output_tokens
        for reason, count in other.finished.items():
            self.finish(reason, count)
        self.ttft.add(other.ttft)
        self.tbt.add(other.tbt)

    def copy(self) -> "Totals":
        """Return the same counts, which stay as they are."""
        return Totals(
            self.started,
            self.prompt_tokens,
            self.output_tokens,
            dict(self.finished),
            self.ttft.copy(),
            self.tbt.copy(),
        )


class AdapterTotals:
    """The Totals of the `most` adapters that something was counted for last. Any thread may call it."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._recent: OrderedDict[str, Totals] = OrderedDict()  # the least recent first
        self._other: Totals | None = None

    def started(self, adapter: str) -> None:
        """Count a request that was accepted."""
        with self._lock:
            self._of(adapter).started += 1

    def first_token(self, adapter: str, seconds: float) -> None:
        """Count the time to a request's first token."""
        with self._lock:
            self._of(adapter).ttft.observe(seconds)

    def next_token(self, adapter: str, seconds: float) -> None:
        """Count the time between two tokens."""
        with self._lock:
            self._of(adapter).tbt.observe(seconds)

    def finished(self, adapter: str, reason: str, prompt_tokens: int, output_tokens: int) -> None:
        """Count a request that ended, and its tokens."""
        with self._lock:
            totals = self._of(adapter)
            totals.finish(reason)
            totals.prompt_tokens += prompt_tokens
            totals.output_tokens += output_tokens

    def snapshot(self) -> dict[str, Totals]:
        """Return the Totals by label at this moment."""
        with self._lock:
            found = {name: totals.copy() for name, totals in self._recent.items()}
            return found if self._other is None else found | {OTHER: self._other.copy()}

    def recent(self) -> tuple[str, ...]:
        """List the adapters whose Totals are told for themselves."""
        with self._lock:
            return tuple(self._recent)

    def _of(self, adapter: str) -> Totals:
        """Return an adapter's Totals to be counted in, as the most recent; the least recent may make room."""
        if adapter in self._recent:
            self._recent.move_to_end(adapter)
            return self._recent[adapter]
        if len(self._recent) >= self._most:
            _, left = self._recent.popitem(last=False)
            self._other = self._other or Totals()
            self._other.add(left)
        totals = self._recent[adapter] = Totals()
        return totals
