"""What one engine did with one workload, and the row of results that it becomes.

Every harness, ours and the peers', writes the same JSON: {"workload", "dtype", "versions", "runs":
[{"wall_s", "output_tok_s", "ttft_mean_s", "tpot_mean_s", "others"}], "requests": [{"token_ids"}]}. Here it is
read and reduced to medians, over the runs that other processes left alone if there are any.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Self

from scripts.bench.limits import Limit
from scripts.bench.machine import QUIET_CORES
from scripts.bench.workload import Workload

TokenIds = tuple[tuple[int, ...], ...]
UNKNOWN_TOKEN_ID = -1


@dataclass(frozen=True, slots=True)
class Run:
    """A workload done once. Times are means over its requests; `others_cores` is the processor time that
    other processes took meanwhile."""

    output_tok_s: float
    ttft_ms: float
    tbt_ms: float
    others_cores: float

    @classmethod
    def parse(cls, run: Mapping[str, float]) -> Self:
        """One entry of a harness' "runs"."""
        return cls(
            round(run["output_tok_s"], 3),
            round(1e3 * run["ttft_mean_s"], 3),
            round(1e3 * run["tpot_mean_s"], 3),
            round(run["others"], 3),
        )


@dataclass(frozen=True, slots=True)
class Measurement:
    """All runs of one workload on one engine, with the answers' token ids."""

    runs: tuple[Run, ...]
    token_ids: TokenIds
    versions: Mapping[str, str]

    @property
    def quiet(self) -> tuple[Run, ...]:
        """The runs that count."""
        return tuple(run for run in self.runs if run.others_cores < QUIET_CORES) or self.runs

    def median(self) -> Run:
        """The median of each figure over the runs that count."""
        columns = zip(*(asdict(run).values() for run in self.quiet), strict=True)
        return Run(*(round(median(column), 3) for column in columns))


def read(path: Path) -> tuple[str, Measurement]:
    """A harness' file: the workload's name and what was measured."""
    found = json.loads(path.read_text())
    measurement = Measurement(
        runs=tuple(Run.parse(run) for run in found["runs"]),
        token_ids=tuple(tuple(request["token_ids"]) for request in found["requests"]),
        versions=found.get("versions", {}),
    )
    return found["workload"], measurement


def same_answers(ours: TokenIds, theirs: TokenIds) -> float | None:
    """Share of rows answered with the same token ids; None if a harness could not tell its ids."""
    if any(UNKNOWN_TOKEN_ID in row for row in theirs):
        return None
    return sum(mine == other for mine, other in zip(ours, theirs, strict=True)) / len(ours)


@dataclass(frozen=True, slots=True)
class Subject:
    """What was measured: an engine on a workload of a model."""

    engine: str
    model: str
    workload: Workload
    dtype: str


def to_row(subject: Subject, measurement: Measurement, limit: Limit) -> dict[str, Any]:
    """One line of the results file. `share_of_limit` is 1 for an engine that no other could beat here."""
    middle = measurement.median()
    return {
        "engine": subject.engine,
        "model": subject.model,
        "workload": subject.workload.kind,
        "batch": subject.workload.batch,
        "dtype": subject.dtype,
        "output_tok_s": middle.output_tok_s,
        "ttft_ms": middle.ttft_ms,
        "tbt_ms": middle.tbt_ms,
        "others_cores": middle.others_cores,
        "limit": {name: round(value, 3) for name, value in asdict(limit).items()},
        "share_of_limit": round(middle.output_tok_s / limit.output_tok_s, 4),
        "runs": [asdict(run) for run in measurement.runs],
        "quiet_runs": sum(run.others_cores < QUIET_CORES for run in measurement.runs),
        "versions": dict(measurement.versions),
    }


METRICS = {"output_tok_s": "output tokens/s", "ttft_ms": "TTFT, ms", "tbt_ms": "TBT, ms"}


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as markdown, one table per metric, a line per workload and a column per engine; of rows that
    measure the same thing the last counts."""
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    cells: dict[tuple[str, ...], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        line = (row["model"], row["dtype"], row["workload"], str(row["batch"]))
        cells.setdefault(line, {})[row["engine"]] = row
    return "\n\n".join(table(metric, engines, cells) for metric in METRICS)


def table(
    metric: str, engines: Sequence[str], cells: Mapping[tuple[str, ...], Mapping[str, Mapping[str, Any]]]
) -> str:
    """One metric's table."""
    header = ["model", "dtype", "workload", "batch", "limit", *engines]
    lines = [f"**{METRICS[metric]}**", "", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for line, by_engine in cells.items():
        limit = next(iter(by_engine.values()))["limit"][metric]
        figures = [limit, *(by_engine[name][metric] if name in by_engine else None for name in engines)]
        lines.append("| " + " | ".join([*line, *map(figure, figures)]) + " |")
    return "\n".join(lines)


def figure(value: float | None) -> str:
    """Three significant digits; a dash for what was not measured."""
    if value is None:
        return "–"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
