"""The frozen values that cluster decisions are made of: what nodes can do, what adapters need, who serves
what.

It knows adapters and nodes by name and number only: no connection, no clock, no bytes of an adapter.
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from lora.adapter import AdapterRef


@dataclass(frozen=True, slots=True)
class OperatingPoints:
    """OP[rank]: the most input plus output tokens/s one node sustains within the SLO when it serves that rank
    only.

    `ranks` ascend; `tokens_per_s` belong to them one by one, are positive and do not ascend.
    """

    ranks: tuple[int, ...]
    tokens_per_s: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.ranks or len(self.ranks) != len(self.tokens_per_s):
            raise ValueError(
                f"ranks={self.ranks} and tokens_per_s={self.tokens_per_s}: give one rate for each rank"
            )
        if any(a >= b for a, b in zip(self.ranks, self.ranks[1:], strict=False)):
            raise ValueError(f"ranks={self.ranks}: give them ascending, each once")
        if any(rate <= 0 for rate in self.tokens_per_s):
            raise ValueError(f"tokens_per_s={self.tokens_per_s}: give positive rates")
        if any(a < b for a, b in zip(self.tokens_per_s, self.tokens_per_s[1:], strict=False)):
            raise ValueError(
                f"tokens_per_s={self.tokens_per_s}: a larger rank cannot be cheaper than a smaller one"
            )

    def at(self, rank: int) -> float:
        """Return OP of any rank, in tokens/s.

        Between two profiled ranks the seconds per token are linear in rank (they are in the cost model too).
        Below the first the first holds, above the last the last line goes on.
        """
        upper = bisect_left(self.ranks, rank)
        if upper < len(self.ranks) and self.ranks[upper] == rank:
            return self.tokens_per_s[upper]
        if upper == 0 or len(self.ranks) == 1:
            return self.tokens_per_s[0]
        upper = min(upper, len(self.ranks) - 1)
        low_rank, high_rank = self.ranks[upper - 1], self.ranks[upper]
        low_s, high_s = 1 / self.tokens_per_s[upper - 1], 1 / self.tokens_per_s[upper]
        return 1 / (low_s + (high_s - low_s) * (rank - low_rank) / (high_rank - low_rank))


@dataclass(frozen=True, slots=True)
class NodeState:
    """One node as the planner sees it: `memory_bytes` for adapters, its operating points, and `slowdown`, how
    many times longer its steps take than its profile says. `held` are the adapters whose bytes it has. Copies
    of one adapter are spread over different `zone`s where that can be had."""

    node: str
    memory_bytes: int
    operating_points: OperatingPoints
    slowdown: float = 1.0
    zone: str = ""
    held: tuple[AdapterRef, ...] = ()

    def sustains(self, rank: int) -> float:
        """Return the tokens/s that this node sustains when all it serves costs as `rank` does."""
        return self.operating_points.at(rank) / self.slowdown


@dataclass(frozen=True, slots=True)
class Demand:
    """Projected input plus output tokens/s of every registered adapter, zero included, in order of
    registration."""

    tokens_per_s: Mapping[AdapterRef, float]


@dataclass(frozen=True, slots=True)
class Share:
    """The part of an adapter's traffic that one node takes, in (0, 1]."""

    node: str
    part: float


Shares = tuple[Share, ...]


@dataclass(frozen=True, slots=True)
class Placement:
    """φ: adapter → its shares, which sum to 1. An adapter that fits in no node's memory has no entry."""

    shares: Mapping[AdapterRef, Shares]


@dataclass(frozen=True, slots=True)
class RoutingTable:
    """adapter → (node, φ). Replaced whole; of two tables the one of the higher version is in force."""

    version: int
    shares: Mapping[AdapterRef, Shares]


EMPTY_PLACEMENT = Placement(MappingProxyType({}))
EMPTY_TABLE = RoutingTable(0, MappingProxyType({}))


def normalised(parts: Iterable[tuple[str, float]]) -> Shares:
    """Return shares that sum to 1 in proportion to `parts`; nodes named twice are merged, parts of 0 left
    out."""
    merged: dict[str, float] = {}
    for node, part in parts:
        if part > 0:
            merged[node] = merged.get(node, 0.0) + part
    total = sum(merged.values())
    return tuple(Share(node, part / total) for node, part in merged.items())
