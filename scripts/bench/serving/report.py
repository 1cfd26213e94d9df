"""Report what every adapter's clients saw, as a table for people and as rows for figures."""

from collections import Counter
from collections.abc import Mapping, Sequence
from math import nan
from typing import Any

import numpy as np

from scripts.bench.serving.client import RequestEnd, RequestOutcome
from scripts.results import Row

ALL = "(all)"
COLUMNS = (
    "model", "rank", "requests", *(end.value for end in RequestEnd),
    "ttft_p50_ms", "ttft_p95_ms", "tbt_p50_ms", "tbt_p95_ms", "output_tok_s",
)  # fmt: skip


_ANSWERED = (RequestEnd.OK, RequestEnd.MISTAKEN, RequestEnd.WRONG)


def row(model: str, rank: int | None, outcomes: Sequence[RequestOutcome], wall_s: float) -> dict[str, Any]:
    """Compute the figures of one model's requests: times of sound ones only, tokens of all."""
    sound = [outcome for outcome in outcomes if outcome.end in _ANSWERED]
    first_ms = [1e3 * outcome.ttft_s for outcome in sound if outcome.piece_times_s]
    gaps_ms = [1e3 * gap_s for outcome in sound for gap_s in outcome.gaps_s]
    output_tokens = sum(outcome.output_tokens for outcome in outcomes)
    ends = Counter(outcome.end for outcome in outcomes)
    return {
        "model": model,
        "rank": rank,
        "requests": len(outcomes),
        **{end.value: ends[end] for end in RequestEnd},
        **_quantiles("ttft", first_ms),
        **_quantiles("tbt", gaps_ms),
        "output_tokens": output_tokens,
        "output_tok_s": output_tokens / wall_s,
    }


def _quantiles(metric: str, times_ms: Sequence[float]) -> dict[str, float]:
    """Take the median and the 95th percentile; NaN of no times."""
    p50, p95 = np.quantile(times_ms, (0.50, 0.95)).tolist() if times_ms else (nan, nan)
    return {f"{metric}_p50_ms": p50, f"{metric}_p95_ms": p95}


def rows(outcomes: Sequence[RequestOutcome], ranks: Mapping[str, int], wall_s: float) -> list[dict[str, Any]]:
    """Make one row per model, the most asked for first, and one for all."""
    by_model: dict[str, list[RequestOutcome]] = {}
    for outcome in outcomes:
        by_model.setdefault(outcome.planned.model, []).append(outcome)
    order = sorted(by_model, key=lambda model: (-len(by_model[model]), model))
    each = [row(model, ranks.get(model), by_model[model], wall_s) for model in order]
    return [*each, row(ALL, None, outcomes, wall_s)]


def table(found: Sequence[Row], columns: Sequence[str] = COLUMNS) -> str:
    """Write the rows in aligned columns."""
    lines = [tuple(columns), *(tuple(cell(each[column]) for column in columns) for each in found)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(columns))]
    return "\n".join(
        "  ".join(text.ljust(width) if place == 0 else text.rjust(width) for place, (text, width) in parts)
        for parts in (enumerate(zip(line, widths, strict=True)) for line in lines)
    )


def cell(value: object) -> str:
    """Write a figure; a dash for what there is none of."""
    if value is None or value != value:
        return "–"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def failures(
    outcomes: Sequence[RequestOutcome], end: RequestEnd = RequestEnd.FAILED, most: int = 5
) -> list[str]:
    """Describe the first few outcomes of an end that should not have been."""
    bad = [outcome for outcome in outcomes if outcome.end is end]
    return [f"{outcome.planned.model}: {outcome.detail}" for outcome in bad[:most]]
