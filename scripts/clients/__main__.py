"""Try other people's clients against a server of the embedded model.

    python -m scripts.clients                    # every client; the first time each is installed
    python -m scripts.clients openai-python      # one
    python -m scripts.clients --page             # write docs/clients.md from the rows again

It exits with 1 if a client fails in something that is no known limit.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.bench.serving.server import started
from scripts.clients.catalogue import CLIENTS, Client, clients_named
from scripts.clients.environments import ROOT, ClientMissing, Environment, prepared
from scripts.clients.page import page
from scripts.results import Row, append_rows, read_rows

CACHE = Path.home() / ".cache" / "loraserve" / "clients"
ROWS, PAGE = ROOT / "results" / "clients.jsonl", ROOT / "docs" / "clients.md"
KEY = "a-key-of-the-clients"
SERVER = ("--no-progress", "--kv-cache-bytes", "64MiB", "--adapter-bytes", "32MiB", "--api-key", KEY)
START_S, PROGRAM_S = 300.0, 900.0


async def try_client(client: Client, url: str, cache: Path) -> Row:
    """Install a client, run its program and return the row; a client that is not to be had is skipped."""
    row = {"started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "client": client.name}
    try:
        environment = await asyncio.to_thread(prepared, client, cache)
    except ClientMissing as missing:
        return row | {"version": client.version, "skipped": str(missing), "tried": []}
    report = await run_program(environment, url, cache / "logs" / f"{client.name}.txt")
    version = client.version or str(report.get("version", ""))
    return row | {"version": version, "skipped": "", "tried": report["tried"]}


async def run_program(environment: Environment, url: str, log: Path) -> dict[str, Any]:
    """Run a client's program to its end and return its report. What it says goes to the log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, log.open("wb") as said:
        out = Path(folder) / "report.json"
        process = await asyncio.create_subprocess_exec(
            *(*environment.command, "--url", url, "--key", KEY, "--out", str(out)),
            env=dict(environment.variables),
            cwd=folder,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=said,
            stderr=said,
        )
        reason = f"the program ended before it reported: {log} has its messages"
        try:
            await asyncio.wait_for(process.wait(), PROGRAM_S)
        except TimeoutError:
            process.kill()
            await process.wait()
            reason = f"the program did not end within {PROGRAM_S:.0f} s: {log} has its messages"
        if out.is_file():
            return json.loads(out.read_text())
    return {"tried": [{"what": "the program", "outcome": "fails", "why": reason}]}


def summary(row: Row) -> str:
    """Describe a row in one line, and each attempt that did not work in another."""
    head = f"{row['client']} {row['version']}"
    if row["skipped"]:
        return f"{head}: skipped: {row['skipped']}"
    works = [each["what"] for each in row["tried"] if each["outcome"] == "ok"]
    others = [
        f"    {each['what']}: {each['outcome']}: {each['why']}"
        for each in row["tried"]
        if each["outcome"] != "ok"
    ]
    return "\n".join([f"{head}: ok: {', '.join(works)}", *others])


async def run(clients: Sequence[Client], cache: Path, rows: Path) -> bool:
    """Try clients one after the other, and append their rows; return whether none failed."""
    passed = True
    async with started(SERVER, ROOT, START_S) as url:
        for client in clients:
            row = await try_client(client, url, cache)
            append_rows(rows, [row])
            print(summary(row), flush=True)
            passed &= all(each["outcome"] != "fails" for each in row["tried"])
    return passed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.clients", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("name", nargs="*", help="clients by name; none: all of them")
    parser.add_argument("--list", action="store_true", help="name the clients and what is installed for them")
    parser.add_argument("--page", action="store_true", help="only write docs/clients.md from the rows")
    parser.add_argument("--cache", type=Path, default=CACHE, help=f"where clients are installed [{CACHE}]")
    parser.add_argument("--rows", type=Path, default=ROWS, help="the file that rows are appended to")
    given = parser.parse_args(arguments)
    if given.list:
        for client in CLIENTS:
            print(client.name, *client.packages, *client.commands)
        return 0
    if given.page:
        PAGE.write_text(page(read_rows(given.rows)))
        return 0
    try:
        clients = clients_named(given.name)
    except ValueError as error:
        parser.error(str(error))
    return 0 if asyncio.run(run(clients, given.cache.expanduser().resolve(), given.rows)) else 1


if __name__ == "__main__":
    sys.exit(main())
