"""What a replay knows that a live cluster does not: the arrivals to come, as rates."""

from bisect import bisect_left
from collections.abc import Sequence

from lora.adapter import AdapterRef
from scheduler.cluster.foresight import Foresight
from scheduler.sim.workload import Arrival


def foresight(arrivals: Sequence[Arrival]) -> Foresight:
    """Input plus output tokens/s by adapter of `arrivals`, which are in order of time."""
    times = [each.call.arrival_s for each in arrivals]

    def rates(from_s: float, to_s: float) -> dict[AdapterRef, float]:
        tokens: dict[AdapterRef, float] = {}
        for each in arrivals[bisect_left(times, from_s) : bisect_left(times, to_s)]:
            size = each.call.prompt_tokens + each.call.output_tokens
            tokens[each.adapter] = tokens.get(each.adapter, 0.0) + size
        return {ref: count / (to_s - from_s) for ref, count in tokens.items()}

    return rates
