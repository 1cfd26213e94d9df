"""Sum up by rank what requests waited for, out of what is counted by adapter."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from engine.metrics.adapter_totals import OTHER, TBT_BOUNDS_S, TTFT_BOUNDS_S, Times, Totals


@dataclass(slots=True)
class RankTotals:
    """What the requests of one rank amount to."""

    requests: int = 0
    output_tokens: int = 0
    ttft: Times = field(default_factory=lambda: Times(TTFT_BOUNDS_S))
    tbt: Times = field(default_factory=lambda: Times(TBT_BOUNDS_S))

    def row(self) -> dict[str, object]:
        """Write the totals as the page reads them."""
        return {
            "requests": self.requests,
            "output_tokens": self.output_tokens,
            "ttft": list(self.ttft.counts),
            "tbt": list(self.tbt.counts),
        }


class RankLatencies:
    """Totals by rank, of adapters that have totals of their own; what joins the others keeps what it has added."""

    def __init__(self) -> None:
        self._before: Mapping[str, Totals] = {}
        self._by_rank: dict[int, RankTotals] = {}

    def take_in(self, totals: Mapping[str, Totals], ranks: Mapping[str, int]) -> None:
        """Add what `totals` have beyond those of the last call; names without a rank are left out."""
        for name, now in totals.items():
            rank = ranks.get(name)
            if rank is None or name == OTHER:
                continue
            before = self._before.get(name, _NONE)
            if before.started > now.started:  # it was among the others meanwhile
                before = _NONE
            if before == now:
                continue
            summed = self._by_rank.setdefault(rank, RankTotals())
            summed.requests += now.started - before.started
            summed.output_tokens += now.output_tokens - before.output_tokens
            for grown, new, old in ((summed.ttft, now.ttft, before.ttft), (summed.tbt, now.tbt, before.tbt)):
                grown.add(Times(new.bounds_s, [a - b for a, b in zip(new.counts, old.counts, strict=True)]))
        self._before = totals

    def rows(self) -> dict[str, dict[str, object]]:
        """Write the totals by rank, in order of ranks."""
        return {str(rank): self._by_rank[rank].row() for rank in sorted(self._by_rank)}


_NONE = Totals()
