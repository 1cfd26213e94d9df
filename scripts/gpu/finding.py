"""A finding and the limit beside it. Knows nothing of what is measured."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import Enum


class Verdict(Enum):
    """OK and FAILED are of checks, which are right or wrong. MET and MISSED are of goals: how fast.

    A finding that has no limit is MEASURED, one that could not be had here is SKIPPED.
    """

    OK = "ok"
    FAILED = "FAILED"
    MET = "met"
    MISSED = "missed"
    MEASURED = ""
    SKIPPED = "skipped"


_NOTABLE = (Verdict.FAILED, Verdict.MISSED)


@dataclass(frozen=True, slots=True)
class Finding:
    """A value and the limit that it is held against; `facts` and `note` say what else is to be known of it."""

    name: str
    value: float | str | None
    unit: str
    verdict: Verdict
    limit: float | None = None
    note: str = ""
    facts: Mapping[str, object] = field(default_factory=dict[str, object])
    section: str = ""

    def within(self, section: str) -> "Finding":
        """Make it a finding of `section`."""
        return replace(self, section=section)

    def untimed(self) -> "Finding":
        """Drop the verdict on a goal, where times mean nothing."""
        is_goal = self.verdict in (Verdict.MET, Verdict.MISSED)
        return replace(self, verdict=Verdict.MEASURED) if is_goal else self

    def as_json(self) -> str:
        """Write one line."""
        facts = {name: _finite(fact) for name, fact in self.facts.items()}
        values = {"value": _finite(self.value), "verdict": self.verdict.name.lower(), "facts": facts}
        return json.dumps(asdict(self) | values)


def _finite(value: object) -> object:
    """Replace infinite numbers and NaN by words: JSON has none."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def measured(name: str, value: float | str, unit: str = "", note: str = "", **facts: object) -> Finding:
    """Make a finding of a value that has no limit."""
    return Finding(name, value, unit, Verdict.MEASURED, note=note, facts=facts)


def check(name: str, value: float, limit: float, unit: str = "", note: str = "", **facts: object) -> Finding:
    """Check a result that is wrong above `limit`; NaN is wrong."""
    verdict = Verdict.OK if value <= limit else Verdict.FAILED
    return Finding(name, value, unit, verdict, limit, note, facts)


def goal(
    name: str, value: float, limit: float, unit: str, note: str = "", *, least: bool = False, **facts: object
) -> Finding:
    """Compare a speed with its goal, at most or at `least`; to miss it is no fault."""
    met = value >= limit if least else value <= limit
    return Finding(name, value, unit, Verdict.MET if met else Verdict.MISSED, limit, note, facts)


def skipped(name: str, reason: str) -> Finding:
    """Make a finding of what could not be had here."""
    return Finding(name, None, "", Verdict.SKIPPED, note=reason)


def failed(name: str, error: BaseException) -> Finding:
    """Make a finding of the error that came instead of a value."""
    last = str(error).strip().splitlines()
    return Finding(name, None, "", Verdict.FAILED, note=f"{type(error).__name__}: {last[-1] if last else ''}")


def table(found: Sequence[Finding]) -> str:
    """Write all findings below one another, the limit beside each."""
    lines = [("section", "what", "value", "limit", "unit", "verdict", "note")]
    for finding in found:
        cells = (
            finding.section,
            finding.name,
            _shown(finding.value),
            _shown(finding.limit),
            finding.unit,
            finding.verdict.value,
            finding.note,
        )
        lines.append(cells)
    widths = [max(len(line[column]) for line in lines) for column in range(6)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[6]]).rstrip()
        for line in lines
    )


def summary(found: Sequence[Finding]) -> str:
    """Count the findings by verdict, and name those to look at."""
    counts = {verdict: sum(finding.verdict is verdict for finding in found) for verdict in Verdict}
    counted = ", ".join(f"{count} {verdict.name.lower()}" for verdict, count in counts.items() if count)
    notable = [
        f"{finding.verdict.value}: {finding.section}: {finding.name}"
        for finding in found
        if finding.verdict in _NOTABLE
    ]
    return "\n".join([f"{len(found)} rows: {counted}", *notable])


def _shown(value: float | str | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
