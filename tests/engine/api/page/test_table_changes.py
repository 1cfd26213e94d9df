"""What the page is told: everything at first, then only what changed; and latencies by rank out of those by adapter."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.api.page.rank_latencies import RankLatencies
from engine.api.page.table_changes import TableChanges
from engine.metrics.adapter_totals import OTHER, AdapterTotals

ROWS = st.dictionaries(
    st.text(max_size=3), st.dictionaries(st.sampled_from("ab"), st.integers(0, 2)), max_size=4
)
TABLES = st.dictionaries(st.sampled_from(("nodes", "adapters")), ROWS)


def parsed(event: bytes) -> tuple[str, Any]:
    """An event's kind and data, as a browser reads it."""
    lines = event.decode().split("\n")
    assert lines[3:] == ["", ""]
    kind, number, data = (line.partition(": ")[2] for line in lines[:3])
    assert int(number) > 0
    return kind, json.loads(data)


def applied(tables: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """The tables after a change, as the page's script makes them."""
    after = {name: dict(rows) for name, rows in tables.items()}
    for name, each in change.items():
        rows = after.setdefault(name, {})
        for key in each.get("gone", ()):
            del rows[key]
        rows.update(each.get("set", {}))
    return after


@pytest.mark.slow
@given(st.lists(TABLES, min_size=2, max_size=6))
def test_changes_lead_from_any_tables_to_the_next(history: list[dict[str, Any]]) -> None:
    changes, known = TableChanges(), {}
    for tables in history:
        event = changes.advance(tables)
        if event is not None:
            kind, change = parsed(event)
            assert kind == "delta"
            known = applied(known, change)
        assert {name: rows for name, rows in known.items() if rows} == {
            name: rows for name, rows in tables.items() if rows
        }


def test_only_rows_that_changed_are_told_and_nothing_where_none_did() -> None:
    changes = TableChanges({"bounds": [1]})
    rows = {str(at): {"rank": at} for at in range(1000)}
    changes.advance({"adapters": rows})
    assert changes.advance({"adapters": dict(rows)}) is None
    event = changes.advance({"adapters": {**rows, "7": {"rank": 8}}})
    assert event is not None
    assert parsed(event) == ("delta", {"adapters": {"set": {"7": {"rank": 8}}}})
    kind, whole = parsed(changes.whole())
    assert (kind, whole["bounds"], len(whole["tables"]["adapters"])) == ("whole", [1], 1000)
    assert changes.whole() is changes.whole(), "it is encoded once, however many ask"


def test_a_name_cannot_end_an_event() -> None:
    name = "x\n\nevent: whole\ndata: {}\r\n\u2028"
    event = TableChanges().advance({"adapters": {name: {"error": name}}})
    assert event is not None
    assert parsed(event)[1] == {"adapters": {"set": {name: {"error": name}}}}
    assert event.count(b"\n") == 4


def test_latencies_by_rank_are_the_sums_of_their_adapters() -> None:
    totals, latencies = AdapterTotals(2), RankLatencies()
    ranks = {"a": 8, "b": 8, "c": 64}
    for name in ("a", "b"):
        totals.started(name)
        totals.first_token(name, 0.2)
    latencies.take_in(totals.snapshot(), ranks)
    totals.started("c")  # a joins the others
    totals.first_token("c", 3.0)
    totals.next_token("c", 0.05)
    latencies.take_in(totals.snapshot(), ranks)
    latencies.take_in(totals.snapshot(), ranks)
    rows = latencies.rows()
    assert OTHER in totals.snapshot()
    assert list(rows) == ["8", "64"]
    assert (rows["8"]["requests"], rows["64"]["requests"]) == (2, 1)
    assert [sum(rows[rank][kind]) for rank in rows for kind in ("ttft", "tbt")] == [2, 0, 1, 1]  # type: ignore[call-overload]
    totals.started("a")  # it comes back, and counts from nothing
    totals.first_token("a", 0.2)
    latencies.take_in(totals.snapshot(), ranks)
    assert latencies.rows()["8"]["requests"] == 3
