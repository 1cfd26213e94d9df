"""Try other people's clients against a server of the embedded model, or the router of a cluster.

    python -m scripts.clients                    # every client; the first time each is installed
    python -m scripts.clients openai-python      # one
    python -m scripts.clients --nodes 2          # against the router of a cluster of two nodes
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

from scripts.arguments import count
from scripts.bench.serving.server import ServerFailed
from scripts.clients.catalogue import CLIENTS, Client, clients_named
from scripts.clients.environments import ROOT, ClientMissing, Environment, prepared
from scripts.clients.page import page
from scripts.clients.servers import KEY, ServerAddress, server_for_clients
from scripts.results import Row, append_rows, read_rows

CACHE = Path.home() / ".cache" / "loraserve" / "clients"
ROWS, PAGE = ROOT / "results" / "clients.jsonl", ROOT / "docs" / "clients.md"
PROGRAM_S = 900.0


async def try_client(client: Client, server: ServerAddress, nodes: int, cache: Path) -> Row:
    """Install a client, run its program and return the row; a client that is not to be had is skipped."""
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    row = {"started": started, "client": client.name, "nodes": nodes}
    try:
        environment = await asyncio.to_thread(prepared, client, cache)
    except ClientMissing as missing:
        return row | {"version": client.version, "skipped": str(missing), "tried": []}
    report = await run_program(environment, server, cache / "logs" / f"{client.name}.txt")
    version = client.version or str(report.get("version", ""))
    return row | {"version": version, "skipped": "", "tried": report["tried"]}


async def run_program(environment: Environment, server: ServerAddress, log: Path) -> dict[str, Any]:
    """Run a client's program to its end and return its report. What it says goes to the log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, log.open("wb") as said:
        out = Path(folder) / "report.json"
        process = await asyncio.create_subprocess_exec(
            *(
                *environment.command,
                "--url",
                server.url,
                "--key",
                KEY,
                "--rpc",
                server.rpc,
                "--out",
                str(out),
            ),
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


async def run(clients: Sequence[Client], nodes: int, cache: Path, rows: Path) -> bool:
    """Try clients one after the other, and append their rows; return whether none failed."""
    passed = True
    async with server_for_clients(nodes, ROOT) as server:
        for client in clients:
            row = await try_client(client, server, nodes, cache)
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
    parser.add_argument(
        "--nodes", type=count, default=0, help="nodes of a cluster whose router is asked; none: one server"
    )
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
    try:
        passed = asyncio.run(run(clients, given.nodes, given.cache.expanduser().resolve(), given.rows))
    except ServerFailed as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
