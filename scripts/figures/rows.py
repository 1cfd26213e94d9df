"""Rows of a results file: what was asked and what came of it, a JSON object on each line.

A row is written as soon as it is known, and a question that has one is not asked again, so an interrupted suite
goes on where it was. Each row names the commit of the code that answered.
"""

import json
import subprocess
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


def commit(of: str = "scheduler") -> str:
    """The last commit that touched that folder, with a `+` where it was changed since."""
    asked = ["git", "log", "-1", "--format=%h", "--", of], ["git", "status", "--porcelain", "--", of]
    found = [
        subprocess.run(each, capture_output=True, text=True, check=False).stdout.strip() for each in asked
    ]
    return found[0] + ("+" if found[1] else "")


class Rows:
    """The rows of one file, by question. Those of the policies `anew` do not count if of another commit."""

    def __init__(self, path: Path, anew: Container[str] = ()) -> None:
        self._path, self._commit, self._anew = path, commit(), anew
        lines = path.read_text().splitlines() if path.exists() else []
        self._rows = {_key(row["asked"]): row for row in map(json.loads, lines)}

    def find(self, asked: Row) -> Row | None:
        """The row that answers, if there is one."""
        row = self._rows.get(_key(asked))
        if row is None or (asked.get("policy", "") in self._anew and row["commit"] != self._commit):
            return None
        return row

    def ask(self, asked: Row, answer: Callable[[], Row]) -> Row:
        """The row that answers; `answer` is called, and the row kept, if there is none."""
        row = self.find(asked)
        return self.keep(asked, answer()) if row is None else row

    def keep(self, asked: Row, answer: Row) -> Row:
        """Write a row, in place of the one that there may be."""
        row = {"asked": asked, **answer, "commit": self._commit}
        self._rows[_key(asked)] = row
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return row

    def all(self) -> list[Row]:
        """Every row, in the order first asked."""
        return list(self._rows.values())

    def tidy(self) -> None:
        """Keep in the file only the last row of each question."""
        self._path.write_text("".join(json.dumps(row) + "\n" for row in self._rows.values()))


def _key(asked: Row) -> str:
    return json.dumps(asked, sort_keys=True)
