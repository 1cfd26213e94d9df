"""Results of a suite: what was asked and what came of it.

A row is written as soon as it is known, and a question that has one is not asked again. So an interrupted
suite goes on where it was. Each row names the commit of the code that answered.
"""

import json
import subprocess
from collections.abc import Callable, Container
from pathlib import Path

from scripts.results import Row, append_rows, read_rows


def commit(of: str = "scheduler") -> str:
    """Name the last commit that touched that folder, with a `+` where it was changed since."""
    asked = ["git", "log", "-1", "--format=%h", "--", of], ["git", "status", "--porcelain", "--", of]
    found = [
        subprocess.run(each, capture_output=True, text=True, check=False).stdout.strip() for each in asked
    ]
    return found[0] + ("+" if found[1] else "")


class SuiteRows:
    """The rows of one file, by question.

    Those of the policies `anew` count only if they are of this commit.
    """

    def __init__(self, path: Path, anew: Container[str] = ()) -> None:
        self._path, self._commit, self._anew = path, commit(), anew
        rows = read_rows(path) if path.exists() else []
        self._rows = {_key(row["asked"]): row for row in rows}

    def find(self, asked: Row) -> Row | None:
        """Find the row that answers."""
        row = self._rows.get(_key(asked))
        if row is None or (asked.get("policy", "") in self._anew and row["commit"] != self._commit):
            return None
        return row

    def ask(self, asked: Row, answer: Callable[[], Row]) -> Row:
        """Find the row that answers; if there is none, call `answer` and keep its row."""
        row = self.find(asked)
        return self.keep(asked, answer()) if row is None else row

    def keep(self, asked: Row, answer: Row) -> Row:
        """Write a row, in place of the one that there may be."""
        row = {"asked": asked, **answer, "commit": self._commit}
        self._rows[_key(asked)] = row
        append_rows(self._path, [row])
        return row

    def all(self) -> list[Row]:
        """List every row, in the order first asked."""
        return list(self._rows.values())

    def tidy(self) -> None:
        """Keep in the file only the last row of each question."""
        self._path.write_text("".join(json.dumps(row) + "\n" for row in self._rows.values()))


def _key(asked: Row) -> str:
    return json.dumps(asked, sort_keys=True)
