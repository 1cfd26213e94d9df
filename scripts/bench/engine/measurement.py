"""What one engine did with one workload, and the row of results that it becomes.

Every harness, loraserve's and the baselines', writes the same JSON: {"workload", "dtype", "versions", "runs":
[{"wall_s", "output_tok_s", "ttft_mean_s", "tpot_mean_s", "others"}], "requests": [{"token_ids"}]}. Here it is
read and reduced to medians, over the runs that other processes left alone if there are any.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Self

from scripts.bench.engine.limits import Limit
from scripts.bench.engine.workload import OfflineWorkload
from scripts.bench.machine import QUIET_CORES
from scripts.results import Row

TokenIds = tuple[tuple[int, ...], ...]
UNKNOWN_TOKEN_ID = -1


@dataclass(frozen=True, slots=True)
class OfflineRun:
    """A workload done once. Times are means over its requests.

    `others_cores` is the processor time that other processes took meanwhile.
    """

    output_tok_s: float
    ttft_ms: float
    tbt_ms: float
    others_cores: float

    @classmethod
    def parse(cls, run: Mapping[str, float]) -> Self:
        """Parse one entry of a harness' "runs"."""
        return cls(
            round(run["output_tok_s"], 3),
            round(1e3 * run["ttft_mean_s"], 3),
            round(1e3 * run["tpot_mean_s"], 3),
            round(run["others"], 3),
        )


@dataclass(frozen=True, slots=True)
class EngineMeasurement:
    """All runs of one workload on one engine, with the answers' token ids."""

    runs: tuple[OfflineRun, ...]
    token_ids: TokenIds
    versions: Mapping[str, str]

    @property
    def quiet(self) -> tuple[OfflineRun, ...]:
        """The runs that count."""
        return tuple(run for run in self.runs if run.others_cores < QUIET_CORES) or self.runs

    def median(self) -> OfflineRun:
        """Take the median of each figure over the runs that count."""
        columns = zip(*(asdict(run).values() for run in self.quiet), strict=True)
        return OfflineRun(*(round(median(column), 3) for column in columns))


def read(path: Path) -> tuple[str, EngineMeasurement]:
    """Read a harness' file: the workload's name and what was measured."""
    found = json.loads(path.read_text())
    measurement = EngineMeasurement(
        runs=tuple(OfflineRun.parse(run) for run in found["runs"]),
        token_ids=tuple(tuple(request["token_ids"]) for request in found["requests"]),
        versions=found.get("versions", {}),
    )
    return found["workload"], measurement


def same_answers(ours: TokenIds, theirs: TokenIds) -> float | None:
    """Compute the share of requests answered with the same token ids; None if a harness does not know its ids."""
    if any(UNKNOWN_TOKEN_ID in row for row in theirs):
        return None
    return sum(mine == other for mine, other in zip(ours, theirs, strict=True)) / len(ours)


@dataclass(frozen=True, slots=True)
class MeasuredEngine:
    """What was measured: an engine on a workload of a model."""

    engine: str
    model: str
    workload: OfflineWorkload
    dtype: str


def to_row(measured: MeasuredEngine, measurement: EngineMeasurement, limit: Limit) -> dict[str, Any]:
    """Make one line of the results file.

    `share_of_limit` is 1 for an engine that no other could beat here.
    """
    middle = measurement.median()
    return {
        "engine": measured.engine,
        "model": measured.model,
        "workload": measured.workload.kind,
        "batch": measured.workload.batch,
        "dtype": measured.dtype,
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


def tables(rows: Sequence[Row]) -> str:
    """Write the rows as markdown: a table per metric, a line per workload, a column per engine.

    Of rows that measure the same thing the last counts.
    """
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    cells: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        line = (row["model"], row["dtype"], row["workload"], str(row["batch"]))
        cells.setdefault(line, {})[row["engine"]] = row
    return "\n\n".join(table(metric, engines, cells) for metric in METRICS)


def table(metric: str, engines: Sequence[str], cells: Mapping[tuple[str, ...], Mapping[str, Row]]) -> str:
    """Write one metric's table."""
    header = ["model", "dtype", "workload", "batch", "limit", *engines]
    lines = [f"**{METRICS[metric]}**", "", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for line, by_engine in cells.items():
        limit = next(iter(by_engine.values()))["limit"][metric]
        figures = [limit, *(by_engine[name][metric] if name in by_engine else None for name in engines)]
        lines.append("| " + " | ".join([*line, *map(figure, figures)]) + " |")
    return "\n".join(lines)


def figure(value: float | None) -> str:
    """Write three significant digits; a dash for what was not measured."""
    if value is None:
        return "–"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
