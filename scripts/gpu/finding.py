"""Finding: one finding and the limit beside it. Knows nothing of what is measured."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import Enum


class Verdict(Enum):
    """OK and FAILED are of checks: results that are right or wrong. MET and MISSED are of goals: how fast. A row that
    has no limit is MEASURED, one that could not be had here is SKIPPED."""

    OK = "ok"
    FAILED = "FAILED"
    MET = "met"
    MISSED = "missed"
    MEASURED = ""
    SKIPPED = "skipped"


_LOOKED_AT = (Verdict.FAILED, Verdict.MISSED)


@dataclass(frozen=True, slots=True)
class Finding:
    """A value, the limit that it is held against, and what else is to be known of it, as numbers (`facts`) or words
    (`note`)."""

    name: str
    value: float | str | None
    unit: str
    verdict: Verdict
    limit: float | None = None
    note: str = ""
    facts: Mapping[str, object] = field(default_factory=dict)
    section: str = ""

    def within(self, section: str) -> "Finding":
        """The row as one of `section`."""
        return replace(self, section=section)

    def rehearsed(self) -> "Finding":
        """The row where times mean nothing: a goal is neither met nor missed."""
        is_goal = self.verdict in (Verdict.MET, Verdict.MISSED)
        return replace(self, verdict=Verdict.MEASURED) if is_goal else self

    def as_json(self) -> str:
        """One line."""
        facts = {name: _finite(fact) for name, fact in self.facts.items()}
        told = {"value": _finite(self.value), "verdict": self.verdict.name.lower(), "facts": facts}
        return json.dumps(asdict(self) | told)


def _finite(value: object) -> object:
    """JSON has no other numbers: they become words."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def measured(name: str, value: float | str, unit: str = "", note: str = "", **facts: object) -> Finding:
    """A value that has no limit."""
    return Finding(name, value, unit, Verdict.MEASURED, note=note, facts=facts)


def check(name: str, value: float, limit: float, unit: str = "", note: str = "", **facts: object) -> Finding:
    """A result that is wrong above `limit`; NaN is wrong."""
    verdict = Verdict.OK if value <= limit else Verdict.FAILED
    return Finding(name, value, unit, verdict, limit, note, facts)


def goal(
    name: str, value: float, limit: float, unit: str, note: str = "", *, least: bool = False, **facts: object
) -> Finding:
    """A speed with what was hoped for, at most or at `least`; to miss it is no fault."""
    met = value >= limit if least else value <= limit
    return Finding(name, value, unit, Verdict.MET if met else Verdict.MISSED, limit, note, facts)


def skipped(name: str, reason: str) -> Finding:
    """What could not be had here."""
    return Finding(name, None, "", Verdict.SKIPPED, note=reason)


def failed(name: str, error: BaseException) -> Finding:
    """What was to be found out when `error` came."""
    last = str(error).strip().splitlines()
    return Finding(name, None, "", Verdict.FAILED, note=f"{type(error).__name__}: {last[-1] if last else ''}")


def table(rows: Sequence[Finding]) -> str:
    """All rows below one another, the limit beside each."""
    lines = [("section", "what", "value", "limit", "unit", "verdict", "note")]
    for row in rows:
        cells = (
            row.section,
            row.name,
            _told(row.value),
            _told(row.limit),
            row.unit,
            row.verdict.value,
            row.note,
        )
        lines.append(cells)
    widths = [max(len(line[column]) for line in lines) for column in range(6)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[6]]).rstrip()
        for line in lines
    )


def summary(rows: Sequence[Finding]) -> str:
    """How many rows ended how, and which are to be looked at."""
    counts = {verdict: sum(row.verdict is verdict for row in rows) for verdict in Verdict}
    told = ", ".join(f"{count} {verdict.name.lower()}" for verdict, count in counts.items() if count)
    looked_at = [
        f"{row.verdict.value}: {row.section}: {row.name}" for row in rows if row.verdict in _LOOKED_AT
    ]
    return "\n".join([f"{len(rows)} rows: {told}", *looked_at])


def _told(value: float | str | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
