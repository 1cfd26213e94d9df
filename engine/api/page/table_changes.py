"""Turn tables into server-sent events: all of them at first, then only the rows that changed.

One encoder serves all who watch: an event is encoded once, whoever it is for.
"""

from collections.abc import Mapping

import msgspec

Row = Mapping[str, object]
Tables = Mapping[str, Mapping[str, Row]]
"""By name of the table and key of the row. A row is replaced whole."""


class TableChanges:
    """The tables as they were last told. `number` counts the changes."""

    def __init__(self, beside: Mapping[str, object] | None = None) -> None:
        """Know no table yet; `beside` is told with the whole."""
        self._beside = dict(beside or {})
        self._tables: Tables = {}
        self._whole: bytes | None = None
        self.number = 0

    def advance(self, tables: Tables) -> bytes | None:
        """Take in what the tables are now; return the event that tells the difference, None if there is none."""
        before, self._tables = self._tables, tables
        changes = {
            name: change
            for name in dict.fromkeys((*before, *tables))
            if (change := _change(before.get(name, {}), tables.get(name, {})))
        }
        if not changes:
            return None
        self._whole = None
        self.number += 1
        return self._event("delta", changes)

    def whole(self) -> bytes:
        """Return the event that tells everything."""
        if self._whole is None:
            self._whole = self._event("whole", {"tables": self._tables, **self._beside})
        return self._whole

    def _event(self, kind: str, value: object) -> bytes:
        """Write an event. JSON has no raw line end, so one line holds it."""
        return b"event: %b\nid: %d\ndata: %b\n\n" % (kind.encode(), self.number, msgspec.json.encode(value))


def _change(before: Mapping[str, Row], now: Mapping[str, Row]) -> dict[str, object]:
    """Return the rows that are new or others, and the keys of those that are gone; nothing if all are the same."""
    if before is now:
        return {}
    change: dict[str, object] = {}
    if fresh := {key: row for key, row in now.items() if row != before.get(key)}:
        change["set"] = fresh
    if gone := [key for key in before if key not in now]:
        change["gone"] = gone
    return change
