"""Demand that is known instead of projected: what a placement could do if nobody had to guess. For replays,
where the future is written down."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from lora.adapter import AdapterRef
from scheduler.cluster.state import Demand

Foresight = Callable[[float, float], Mapping[AdapterRef, float]]
"""(from s, to s) → input plus output tokens/s of the adapters that will be asked for in between."""


class ForeseenDemand:
    """Stands in for a tracker: projects the true rates of the next `ahead_s`."""

    def __init__(self, foresight: Foresight, ahead_s: float = 20.0) -> None:
        self._foresight, self._ahead_s = foresight, ahead_s
        self._adapters: dict[AdapterRef, None] = {}

    def add(self, adapter: AdapterRef) -> None:
        """`adapter` is among those projected from now on."""
        self._adapters[adapter] = None

    def remove(self, adapter: AdapterRef) -> None:
        """It is not any more."""
        del self._adapters[adapter]

    def observe(self, adapter: AdapterRef, tokens: int, now: float) -> bool:
        """Nothing that happens is news."""
        return False

    def project(self, now: float) -> Demand:
        """Tokens/s from `now` on, in order of registration."""
        rates = self._foresight(now, now + self._ahead_s)
        return Demand(MappingProxyType({ref: rates.get(ref, 0.0) for ref in self._adapters}))
