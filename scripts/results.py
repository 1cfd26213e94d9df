"""Read and write results files: one JSON object a line, appended as it is known."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
"""One line of a results file."""


def read_rows(path: Path) -> list[Row]:
    """Read all rows."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_last_run(path: Path) -> list[Row]:
    """Read the rows that started with the last one."""
    rows = read_rows(path)
    return [row for row in rows if row["started"] == rows[-1]["started"]]


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Append each row as it comes, so that an interrupted run keeps what it has; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
            file.flush()
