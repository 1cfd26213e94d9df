"""Which of the adapters that a node cached for requests go first when room is needed: policies of one protocol.

What is kept on the coordinator's behalf or in use is not theirs to judge.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from lora.adapter import AdapterRef

_HALF_LIFE_S = 60.0


@dataclass(slots=True)
class Usage:
    """How an adapter has been asked for on one node: `uses` is a count of requests in which each weighs half
    as much a minute later, as of `used_s`, when it was used last."""

    ref: AdapterRef
    uses: float = 0.0
    used_s: float = 0.0

    def use(self, now: float) -> None:
        """One more request, or its end."""
        self.uses = self.popularity(now) + 1.0
        self.used_s = now

    def popularity(self, now: float) -> float:
        """`uses` as it weighs at `now`."""
        return self.uses * 0.5 ** ((now - self.used_s) / _HALF_LIFE_S)


class EvictionPolicy(Protocol):
    """Says who goes first."""

    def order(self, idle: Sequence[Usage], now: float) -> list[Usage]:
        """All of `idle`, the first to go first."""
        ...


class LruEviction:
    """The longest unused first."""

    def order(self, idle: Sequence[Usage], now: float) -> list[Usage]:
        """By `used_s`."""
        return sorted(idle, key=lambda usage: usage.used_s)


class CheapestEviction:
    """Least expected reload time for the bytes gained first: popularity · reload seconds / bytes. A reload
    takes `latency_s` and its bytes at `bytes_per_s`."""

    def __init__(self, latency_s: float = 0.002, bytes_per_s: float = 25e9) -> None:
        self._latency_s, self._bytes_per_s = latency_s, bytes_per_s

    def order(self, idle: Sequence[Usage], now: float) -> list[Usage]:
        """By loss for each byte."""
        return sorted(idle, key=lambda usage: self._loss(usage, now))

    def _loss(self, usage: Usage, now: float) -> float:
        nbytes = max(1, usage.ref.nbytes)
        return usage.popularity(now) * (self._latency_s / nbytes + 1 / self._bytes_per_s)
