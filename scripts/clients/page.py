"""Write docs/clients.md from the rows of results/clients.jsonl."""

from collections.abc import Iterator, Mapping, Sequence
from textwrap import wrap
from typing import Any

from scripts.clients.catalogue import CLIENTS
from scripts.results import Row

COLUMNS = ("plain", "stream", "adapter", "error", "batch", "logprobs", "stop", "cancel")
"""What every client tries that can; everything else stands below the table."""

CELLS: Mapping[str, str] = {"ok": "ok", "limit": "no", "fails": "fails"}
NOT_TRIED = "–"
_WIDTH = 100
_INTRODUCTION = """\
# Clients

This page is made by `python -m scripts.clients --page`; do not edit it. `python -m scripts.clients` runs the clients
again, each unmodified and in an environment of its own, against a server of the embedded model. With `--nodes 2` it
starts a cluster on this machine, and the clients ask its router. They come from the package registries.

- *stream* is a stream with its usage, and *adapter* an answer of an adapter, by its name as the model.
- *error* is an unknown model, which must raise the client's own exception.
- *batch* is several prompts in one call, and *cancel* a stream that the client leaves: the server must abort it.
- "–" was not tried, mostly because the client has no way to ask for it.
- A release is the one that was tried last, and *grpcurl* asks by gRPC alone, with what reflection tells it.
- *SGLang's payloads* are those of its bench_serving, replayed: that client imports all of SGLang.
"""


def latest(rows: Sequence[Row]) -> list[Row]:
    """Select the last row of each client that is in the catalogue, in its order: of one server, then of clusters."""
    last = {(is_of_cluster(row), row["client"]): row for row in rows}
    order = [(cluster, client.name) for cluster in (False, True) for client in CLIENTS]
    return [last[place] for place in order if place in last]


def is_of_cluster(row: Row) -> bool:
    """Tell whether the client asked the router of a cluster."""
    return bool(row.get("nodes", 0))


def page(rows: Sequence[Row]) -> str:
    """Return the page: tables, what does not work, and what else was tried."""
    titles = {client.name: client.title for client in CLIENTS}
    last = latest(rows)
    lines = list(_introduction())
    for title, cluster in (("One server", False), ("The router of a cluster", True)):
        if here := [row for row in last if is_of_cluster(row) == cluster]:
            lines += [f"## {title}", "", *_section([row for row in here if not row["skipped"]], titles)]
            lines += _list("What was not tried here", _skipped(here, titles))
    return "\n".join(lines).rstrip("\n") + "\n"


def _section(ran: Sequence[Row], titles: Mapping[str, str]) -> Iterator[str]:
    """Yield the table, what does not work, and what else works, of one kind of server."""
    yield from (f"| client | version | {' | '.join(COLUMNS)} |", "|---" * (2 + len(COLUMNS)) + "|")
    yield from (_table_row(titles[row["client"]], row) for row in ran)
    yield ""
    reasons = _reasons(ran, titles)
    yield from _list("What does not work", [f"{why}: {', '.join(who)}." for why, who in reasons.items()])
    others = [(titles[row["client"]], _others(row)) for row in ran]
    works = [f"{title}: {'; '.join(names)}." for title, names in others if names]
    yield from _list("What else was tried, and works", works)


def _others(row: Row) -> list[str]:
    """Select what works beside the columns."""
    return [each["what"] for each in row["tried"] if each["what"] not in COLUMNS and each["outcome"] == "ok"]


def _skipped(rows: Sequence[Row], titles: Mapping[str, str]) -> list[str]:
    return [f"{titles[row['client']]}: {row['skipped']}." for row in rows if row["skipped"]]


def _list(title: str, items: Sequence[str]) -> list[str]:
    """Return a list below a heading; nothing where there is nothing to list."""
    if not items:
        return []
    return [f"### {title}", "", *(line for item in items for line in _item(item)), ""]


def _reasons(rows: Sequence[Row], titles: Mapping[str, str]) -> dict[str, list[str]]:
    """Group the clients by what does not work with them; a failure has the attempt's name too."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for attempt in row["tried"]:
            if attempt["outcome"] != "ok":
                place = f" ({attempt['what']})" if attempt["outcome"] == "fails" else ""
                found.setdefault(attempt["why"], []).append(titles[row["client"]] + place)
    return found


def _introduction() -> Iterator[str]:
    for block in _INTRODUCTION.strip().split("\n\n"):
        if block.startswith(("#", "-")):
            for line in block.splitlines():
                yield from [line] if line.startswith("#") else _item(line.removeprefix("- "))
        else:
            yield from wrap(" ".join(block.split()), _WIDTH, break_on_hyphens=False)
        yield ""


def _item(text: str) -> list[str]:
    return wrap(
        text,
        _WIDTH,
        initial_indent="- ",
        subsequent_indent="  ",
        break_on_hyphens=False,
        break_long_words=False,
    )


def _table_row(title: str, row: Row) -> str:
    outcomes: dict[str, Any] = {attempt["what"]: attempt["outcome"] for attempt in row["tried"]}
    cells = [CELLS[outcomes[what]] if what in outcomes else NOT_TRIED for what in COLUMNS]
    return f"| {title} | {row['version']} | {' | '.join(cells)} |"
