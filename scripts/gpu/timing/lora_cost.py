"""Time what adapters add to a decode step, beside what reading their bytes once must take."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import isnan, nan
from statistics import median
from typing import Any

from lora.segments import NO_SEGMENTS
from scripts.gpu.context import CheckContext
from scripts.gpu.finding import Finding, goal, measured, skipped
from scripts.gpu.timing.timed_model import MIXES, DecodeSteps, TimedModel

WIDE_MIXES = ("all 8", "uniform 8..128", "70/20/8/2 %")
NARROW_MIXES = (*WIDE_MIXES, "all 128", "31 of 8, one of 128")
LONE_MIXES = ("31 of 8, one of 128", "all 8")
EFFICIENCY = 0.70
LONG_FLOOR_MS = 1.5
SHORT_ALLOWANCE_MS = 0.25
LONE_GOAL_MS = 0.21
DOCUMENTED_BYTES_PER_S = 3.0e12
_ROUNDS = 3
_LEAST_LEFT_S = 15.0


@dataclass(frozen=True, slots=True)
class LoraCost:
    """A step without and with adapters, in ms, taken in turns; and the bytes of the adapters."""

    base_ms: float
    with_ms: float
    nbytes: int
    spread_ms: float  # between rounds of the same step: less than that is noise

    @property
    def added_ms(self) -> float:
        """What the adapters cost."""
        return self.with_ms - self.base_ms


def findings(context: CheckContext) -> Iterator[Finding]:
    """Time every mix at every width."""
    timed = context.once(TimedModel)
    yield measured("attention", timed.attention_name)
    found: dict[str, LoraCost] = {}
    for width in context.sizes.widths:
        decode = DecodeSteps(timed, width)
        for mix in NARROW_MIXES if width == context.sizes.widths[0] else WIDE_MIXES:
            name = f"{mix}, {width} sequences"
            if context.left_s < _LEAST_LEFT_S:
                yield skipped(name, f"{max(0, context.left_s):.0f} s are left")
                continue
            yield from context.try_finding(name, lambda mix=mix, name=name, decode=decode, width=width: _cost(
                name, found.setdefault(name, measure(timed, decode, MIXES[mix](width))), context
            ))  # fmt: skip
    among, alone = (found.get(f"{mix}, {context.sizes.widths[0]} sequences") for mix in LONE_MIXES)
    if among is None or alone is None:
        yield skipped("one of 128 among 31 of 8", "one of the two steps was not timed")
    else:
        added_ms = among.added_ms - alone.added_ms
        yield goal("one of 128 among 31 of 8", added_ms, LONE_GOAL_MS, "ms more than all 8")


def measure(timed: TimedModel, decode: DecodeSteps, ranks: list[int]) -> LoraCost:
    """Time base and adapters in turns, so that a clock that drifts affects both."""
    medians_ms: dict[bool, list[float]] = {True: [], False: []}
    segments = decode.table(timed.adapters(ranks))
    for _ in range(_ROUNDS):
        for adapted in (False, True):
            run = decode.load(segments if adapted else NO_SEGMENTS)
            medians_ms[adapted].append(timed.context.median_ms(run, timed.context.sizes.replays))
    spread_ms = max(max(rounds) - min(rounds) for rounds in medians_ms.values())
    nbytes = sum(map(timed.nbytes, ranks))
    return LoraCost(median(medians_ms[False]), median(medians_ms[True]), nbytes, spread_ms)


def _cost(name: str, found: LoraCost, context: CheckContext) -> Finding:
    """Judge the efficiency, floor over added time, where reading takes long; else the added time."""
    floor_ms = 1e3 * found.nbytes / context.copy_bytes_per_s
    efficiency = (
        floor_ms / found.added_ms if found.added_ms > 0 else nan
    )  # no slower: what was timed is noise
    facts: dict[str, Any] = {
        "base_ms": found.base_ms,
        "with_ms": found.with_ms,
        "added_ms": found.added_ms,
        "floor_ms": floor_ms,
        "floor_at_3_tb_s_ms": 1e3 * found.nbytes / DOCUMENTED_BYTES_PER_S,
        "nbytes": found.nbytes,
        "spread_ms": found.spread_ms,
        "efficiency": efficiency,
    }
    reached = "below the noise" if isnan(efficiency) else f"{efficiency:.2f} of it"
    note = f"{found.base_ms:.2f} ms {found.added_ms:+.2f}, floor {floor_ms:.2f}, {reached}"
    if floor_ms >= LONG_FLOOR_MS:
        return goal(name, efficiency, EFFICIENCY, "of floor", note, least=True, **facts)
    return goal(name, found.added_ms, floor_ms + SHORT_ALLOWANCE_MS, "ms added", note, **facts)
