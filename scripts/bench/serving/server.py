"""A server under load: start it or find it at a URL, ask for its models, and check what it left behind.

A server that has answered everything holds nothing: no sequence runs or waits, and every block of K/V memory
is free or kept for its prefix alone. Its own metrics must say so.
"""

import asyncio
import json
import re
import sys
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import aiohttp

READY = re.compile(rb"https?://[^\s/]+:\d+")
STOP_S = 30.0
POLL_S = 0.1
SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*(?:\{.*\})?)\s+(\S+)$", re.MULTILINE)


class ServerFailed(RuntimeError):
    """The server did not start, or did not answer as a server should."""


@dataclass(frozen=True, slots=True)
class ListedModels:
    """What /v1/models lists. `ranks` has the adapters whose folders can be read from here."""

    base: str
    adapters: tuple[str, ...]
    ranks: Mapping[str, int]
    max_model_len: int


def parse_models(listed: Mapping[str, Sequence[Mapping[str, object]]]) -> ListedModels:
    """Parse the list: adapters are the entries with a parent. Raises ServerFailed if there is no base."""
    bases = [entry for entry in listed["data"] if entry.get("parent") is None]
    adapters = [entry for entry in listed["data"] if entry.get("parent") is not None]
    if not bases:
        raise ServerFailed("/v1/models lists no model without a parent: is this a server of a base model?")
    ranks = {str(entry["id"]): read_rank(Path(str(entry.get("root")))) for entry in adapters}
    return ListedModels(
        base=str(bases[0]["id"]),
        adapters=tuple(str(entry["id"]) for entry in adapters),
        ranks={name: rank for name, rank in ranks.items() if rank is not None},
        max_model_len=int(str(bases[0].get("max_model_len", 2048))),
    )


def read_rank(folder: Path) -> int | None:
    """Read the largest rank that a PEFT folder's config names; None if there is no such folder here."""
    config = folder / "adapter_config.json"
    if not config.is_file():
        return None
    found: dict[str, Any] = json.loads(config.read_text())
    pattern: dict[str, int] = found.get("rank_pattern") or {}
    return max([found["r"], *pattern.values()])


def parse_metrics(text: str) -> dict[str, float]:
    """Parse the samples of Prometheus' text format, by name with labels."""
    return {name: float(value) for name, value in SAMPLE.findall(text)}


HELD = (
    "loraserve_sequences_running",
    "loraserve_sequences_waiting",
    'loraserve_kv_blocks{state="used"}',
)
"""What is zero in a server at rest."""
STALLS = 'loraserve_event_loop_stalls_total{over="20ms"}'
STARTED, FINISHED = "loraserve_requests_started_total{", "loraserve_requests_finished_total{"


def leftovers(metrics: Mapping[str, float]) -> dict[str, float]:
    """Select what a server still holds, and count the requests that it began and never ended.

    Raises ServerFailed if it does not say.
    """
    missing = [name for name in HELD if name not in metrics]
    if missing:
        raise ServerFailed(f"/metrics has no {', '.join(missing)}: nothing can be said about leaks")
    begun, ended = (
        sum(value for name, value in metrics.items() if name.startswith(prefix))
        for prefix in (STARTED, FINISHED)
    )
    held = {name: metrics[name] for name in HELD} | {"requests without an end": begun - ended}
    return {name: value for name, value in held.items() if value}


def event_loop_stalls(metrics: Mapping[str, float]) -> float | None:
    """Count how often the server's event loop came over 20 ms late; None if the server does not say."""
    return metrics.get(STALLS)


class ServerProbe:
    """Asks a server about itself, beside the load."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url

    async def models(self) -> ListedModels:
        """List what can be asked for."""
        async with self._session.get(f"{self._url}/v1/models") as response:
            response.raise_for_status()
            return parse_models(await response.json())

    async def metrics(self) -> dict[str, float]:
        """Read its metrics now."""
        async with self._session.get(f"{self._url}/metrics") as response:
            response.raise_for_status()
            return parse_metrics(await response.text())

    async def tier(self, name: str) -> str:
        """Tell which tier has an adapter now; "" if none is known. Raises ServerFailed for an unknown name."""
        async with self._session.get(f"{self._url}/v1/adapters/{name}") as response:
            if response.status != HTTPStatus.OK:
                raise ServerFailed(f"/v1/adapters/{name}: {(await response.text())[:300]}")
            tiers: Mapping[str, str] = (await response.json())["tiers"]
            return next(iter(tiers.values()), "")

    async def rest(self, patience_s: float) -> dict[str, float]:
        """Wait until the server holds nothing, at most so long; return what it holds even then."""
        deadline_s = time.monotonic() + patience_s
        while (held := leftovers(await self.metrics())) and time.monotonic() < deadline_s:
            await asyncio.sleep(POLL_S)
        return held


@asynccontextmanager
async def started(arguments: Sequence[str], cwd: Path, timeout_s: float) -> AsyncGenerator[str, None]:
    """Start a server on a free port of the loopback interface, and yield its URL; it ends with the block.

    Raises ServerFailed.
    """
    async with launched(arguments, cwd, timeout_s, READY) as ready:
        yield ready[0].decode()


@asynccontextmanager
async def launched(
    arguments: Sequence[str], cwd: Path, timeout_s: float, pattern: re.Pattern[bytes], stop_s: float = STOP_S
) -> AsyncGenerator[re.Match[bytes], None]:
    """Start a server on a free port, and yield what `pattern` finds when it is ready; it ends with the block.

    It is killed if it does not end in `stop_s`. Raises ServerFailed.
    """
    command = [sys.executable, "-m", "engine.serve", "--port", "0", *arguments]
    process = await asyncio.create_subprocess_exec(*command, cwd=cwd, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None, "a pipe was asked for"
    try:
        ready = await ready_line(process.stdout, timeout_s, pattern)
        drain = asyncio.create_task(process.stdout.read())  # a full pipe would stop the server
        yield ready
        drain.cancel()
    finally:
        status = await end(process, stop_s)
    if status:
        raise ServerFailed(f"the server ended with exit status {status} when it was asked to stop")


async def ready_line(
    lines: asyncio.StreamReader, timeout_s: float, pattern: re.Pattern[bytes]
) -> re.Match[bytes]:
    """Read lines until one has the pattern. Raises ServerFailed if none comes in time."""
    try:
        async with asyncio.timeout(timeout_s):
            async for line in lines:
                if found := pattern.search(line):
                    return found
    except TimeoutError as error:
        raise ServerFailed(f"the server was not ready after {timeout_s:.0f} s") from error
    raise ServerFailed("the server ended before it was ready: its messages are above")


async def end(process: asyncio.subprocess.Process, stop_s: float) -> int:
    """Ask it to stop, and kill it if it does not in time; return its exit status."""
    if process.returncode is None:
        process.terminate()
    try:
        async with asyncio.timeout(stop_s):
            return await process.wait()
    except TimeoutError:
        process.kill()
        return await process.wait()
