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
again, each unmodified and in an environment of its own, against a server of the embedded model. They come from the
package registries.

- *stream* is a stream with its usage, and *adapter* an answer of an adapter, by its name as the model.
- *error* is an unknown model, which must raise the client's own exception.
- *batch* is several prompts in one call, and *cancel* a stream that the client leaves: the server must abort it.
- "–" was not tried, mostly because the client has no way to ask for it.
- *SGLang's payloads* are those of its bench_serving, replayed: that client imports all of SGLang.
"""


def latest(rows: Sequence[Row]) -> list[Row]:
    """Select the last row of each client that is in the catalogue, in its order."""
    by_name = {row["client"]: row for row in rows}
    return [by_name[client.name] for client in CLIENTS if client.name in by_name]


def page(rows: Sequence[Row]) -> str:
    """Return the page: the table, what does not work, and what else was tried."""
    titles = {client.name: client.title for client in CLIENTS}
    last = latest(rows)
    ran = [row for row in last if not row["skipped"]]
    lines = list(_introduction())
    lines += [f"| client | version | {' | '.join(COLUMNS)} |", "|---" * (2 + len(COLUMNS)) + "|"]
    lines += [_table_row(titles[row["client"]], row) for row in ran]
    lines += ["", "## What does not work", ""]
    for why, clients in _reasons(ran, titles).items():
        lines += _item(f"{why}: {', '.join(clients)}.")
    lines += ["", "## What else was tried, and works", ""]
    for row in ran:
        names = [
            each["what"] for each in row["tried"] if each["what"] not in COLUMNS and each["outcome"] == "ok"
        ]
        if names:
            lines += _item(f"{titles[row['client']]}: {'; '.join(names)}.")
    if skipped := [row for row in last if row["skipped"]]:
        lines += ["", "## What was not tried here", ""]
        for row in skipped:
            lines += _item(f"{titles[row['client']]}: {row['skipped']}.")
    return "\n".join(lines) + "\n"


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
