"""The load's report: what every adapter's clients saw, as a table for people and as rows for figures."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from scripts.bench.client import Outcome, Verdict
from scripts.bench.quantile import quantile

ALL = "(all)"
COLUMNS = (
    "model", "rank", "requests", *(verdict.value for verdict in Verdict),
    "ttft_p50_ms", "ttft_p95_ms", "tbt_p50_ms", "tbt_p95_ms", "output_tok_s",
)  # fmt: skip


def row(model: str, rank: int | None, outcomes: Sequence[Outcome], wall_s: float) -> dict[str, Any]:
    """The figures of one model's requests. Times are of sound requests only; tokens of all that came."""
    sound = [outcome for outcome in outcomes if outcome.verdict in (Verdict.OK, Verdict.WRONG)]
    first_ms = [1e3 * outcome.ttft_s for outcome in sound if outcome.piece_times_s]
    gaps_ms = [1e3 * gap_s for outcome in sound for gap_s in outcome.gaps_s]
    output_tokens = sum(outcome.output_tokens for outcome in outcomes)
    verdicts = Counter(outcome.verdict for outcome in outcomes)
    return {
        "model": model,
        "rank": rank,
        "requests": len(outcomes),
        **{verdict.value: verdicts[verdict] for verdict in Verdict},
        "ttft_p50_ms": quantile(first_ms, 0.50),
        "ttft_p95_ms": quantile(first_ms, 0.95),
        "tbt_p50_ms": quantile(gaps_ms, 0.50),
        "tbt_p95_ms": quantile(gaps_ms, 0.95),
        "output_tokens": output_tokens,
        "output_tok_s": output_tokens / wall_s,
    }


def rows(outcomes: Sequence[Outcome], ranks: Mapping[str, int], wall_s: float) -> list[dict[str, Any]]:
    """One row per model, the most asked for first, and one for all."""
    by_model: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_model.setdefault(outcome.arrival.model, []).append(outcome)
    order = sorted(by_model, key=lambda model: (-len(by_model[model]), model))
    each = [row(model, ranks.get(model), by_model[model], wall_s) for model in order]
    return [*each, row(ALL, None, outcomes, wall_s)]


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """The rows in aligned columns."""
    lines = [COLUMNS, *(tuple(cell(each[column]) for column in COLUMNS) for each in found)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(text.ljust(width) if place == 0 else text.rjust(width) for place, (text, width) in parts)
        for parts in (enumerate(zip(line, widths, strict=True)) for line in lines)
    )


def cell(value: object) -> str:
    """A figure as text; a dash for what there is none of."""
    if value is None or value != value:
        return "–"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def grievances(outcomes: Sequence[Outcome], most: int = 5) -> list[str]:
    """The first few outcomes that should not have been, in words."""
    bad = [outcome for outcome in outcomes if outcome.verdict is Verdict.FAILED]
    return [f"{outcome.arrival.model}: {outcome.detail}" for outcome in bad[:most]]
