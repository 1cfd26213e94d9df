"""Remember the last steps of an engine, for whoever looks into what ran with what.

The step thread adds to it; any thread may read. Plans are kept as they are, and described only when somebody asks.
"""

import threading
import time
from collections import deque

from msgspec import Struct

from scheduler.plan import StepPlan

MOST_STEPS = 64


class StepSlice(Struct, frozen=True):
    """The tokens of one sequence in a step: how many from which position, and whether a token is drawn.

    `adapter` is the name that the content was read under, None for the base model, whose rank is 0.
    """

    request_id: str
    sequence: int
    adapter: str | None
    rank: int
    start: int
    tokens: int
    draws: bool


class StepRecord(Struct, frozen=True):
    """One step: its number since the start, when it ended (seconds since 1970), and how long it took.

    `tokens` are the rows of its batch, `adapters` the distinct ones but the base.
    """

    number: int
    at_s: float
    seconds: float
    tokens: int
    adapters: int
    slices: tuple[StepSlice, ...]


class StepHistory:
    """The last MOST_STEPS steps, and the number of all."""

    def __init__(self) -> None:
        """Remember nothing yet."""
        self.count = 0
        self._lock = threading.Lock()
        self._last: deque[tuple[int, float, float, StepPlan]] = deque(maxlen=MOST_STEPS)

    def ran(self, plan: StepPlan, seconds: float) -> None:
        """Take in that a plan was computed, in `seconds` since the step before or its launch."""
        with self._lock:
            self.count += 1
            self._last.append((self.count, time.time(), seconds, plan))

    def last(self) -> list[StepRecord]:
        """Describe the last steps, the newest first."""
        with self._lock:
            kept = list(self._last)
        return [_record(*each) for each in reversed(kept)]


def _record(number: int, at_s: float, seconds: float, plan: StepPlan) -> StepRecord:
    slices = tuple(
        StepSlice(
            each.key.request_id,
            each.key.index,
            None if each.adapter.is_base else each.adapter.name,
            each.adapter.rank,
            each.start,
            len(each.token_ids),
            each.samples,
        )
        for each in plan.slices
    )
    return StepRecord(number, round(at_s, 3), round(seconds, 6), plan.num_tokens, len(plan.adapters), slices)
