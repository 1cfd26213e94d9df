"""Give demand that is known instead of projected: what a placement could do if nobody had to guess.

For replays, where the arrivals to come are written down.
"""

from bisect import bisect_left
from collections.abc import Sequence
from types import MappingProxyType

from lora.adapter import AdapterRef
from scheduler.cluster.policies import KnownRates
from scheduler.cluster.state import Demand
from scheduler.sim.workload.trace import Arrival


class OracleDemand:
    """Projects, in place of a tracker, the true rates of the next `ahead_s`."""

    def __init__(self, known_rates: KnownRates, ahead_s: float = 20.0) -> None:
        self._known_rates, self._ahead_s = known_rates, ahead_s
        self._adapters: dict[AdapterRef, None] = {}

    def add(self, adapter: AdapterRef) -> None:
        """Project `adapter` too, from now on."""
        self._adapters[adapter] = None

    def remove(self, adapter: AdapterRef) -> None:
        """Project it no more."""
        del self._adapters[adapter]

    def observe(self, adapter: AdapterRef, tokens: int, now: float) -> bool:
        """Learn nothing: all is known."""
        return False

    def project(self, now: float) -> Demand:
        """Return tokens/s from `now` on, in order of registration."""
        rates = self._known_rates(now, now + self._ahead_s)
        return Demand(MappingProxyType({ref: rates.get(ref, 0.0) for ref in self._adapters}))


def oracle_rates(arrivals: Sequence[Arrival]) -> KnownRates:
    """Return input plus output tokens/s by adapter of `arrivals`, which are in order of time."""
    times = [each.call.arrival_s for each in arrivals]

    def rates(from_s: float, to_s: float) -> dict[AdapterRef, float]:
        tokens: dict[AdapterRef, float] = {}
        for each in arrivals[bisect_left(times, from_s) : bisect_left(times, to_s)]:
            size = each.call.prompt_tokens + each.call.output_tokens
            tokens[each.adapter] = tokens.get(each.adapter, 0.0) + size
        return {ref: count / (to_s - from_s) for ref, count in tokens.items()}

    return rates
