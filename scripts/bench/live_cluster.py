"""Run a cluster of the embedded model for a benchmark, and time the streams that it answers."""

import asyncio
import os
import tempfile
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from engine.demo.embedded import DEMO_BASE, adapter_folders
from scripts.bench.serving.client import events
from scripts.chaos.cluster_processes import ClusterPlan, ClusterProcesses

_POLL_S = 0.2
_TICKS = os.sysconf("SC_CLK_TCK")


class NotServed(ValueError):
    """A request that was to be answered was not; says what came in place of it."""


@dataclass(frozen=True, slots=True)
class TimedStream:
    """When a request was sent, and when each piece of its answer came; `status` is HTTP's."""

    status: int
    sent_s: float
    piece_times_s: tuple[float, ...] = ()

    @property
    def ttft_s(self) -> float:
        """Return the seconds to the first piece."""
        return self.piece_times_s[0] - self.sent_s

    @property
    def gap_s(self) -> float:
        """Return the mean seconds between pieces."""
        return (self.piece_times_s[-1] - self.piece_times_s[0]) / (len(self.piece_times_s) - 1)


def asked(model: str, tokens: int) -> Mapping[str, object]:
    """Return a body whose answer is a stream of exactly so many tokens."""
    return {
        "model": model, "prompt": "garden", "stream": True, "temperature": 0, "max_tokens": tokens,
        "ignore_eos": True,
    }  # fmt: skip


async def timed_stream(
    session: aiohttp.ClientSession, address: str, body: Mapping[str, object]
) -> TimedStream:
    """Send a completion, and note when each piece of the answer came; without pieces unless it was a 200."""
    sent_s = time.perf_counter()
    async with session.post(f"{address}/v1/completions", json=body) as response:
        if response.status != 200:
            return TimedStream(response.status, sent_s)
        times = [time.perf_counter() async for event in events(response) if event.get("choices")]
    return TimedStream(response.status, sent_s, tuple(times))


def cpu_s(pid: int) -> float:
    """Return the seconds of processor that a process has taken, its threads included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


@asynccontextmanager
async def live_cluster(
    nodes: int, options: Sequence[str] = (), start_s: float = 120.0
) -> AsyncGenerator[ClusterProcesses]:
    """Run a coordinator, one router and so many nodes, all of which are ready. Raises NotServed."""
    with tempfile.TemporaryDirectory() as work:
        processes = ClusterProcesses(
            ClusterPlan(nodes, 1, DEMO_BASE.parent / "adapters", Path(work), tuple(options)), None
        )
        processes.start()
        try:
            async with aiohttp.ClientSession() as session:
                await _wait_until_ready(processes, session, start_s)
            yield processes
        finally:
            await processes.stop()


async def _wait_until_ready(
    processes: ClusterProcesses, session: aiohttp.ClientSession, start_s: float
) -> None:
    waiting = [name for name in processes.plan.names if name != "coordinator"]
    end_s = time.monotonic() + start_s
    while waiting:
        if time.monotonic() > end_s:
            raise NotServed(f"{', '.join(waiting)} did not become ready within {start_s:g} s")
        try:
            if await _is_ready(session, processes.address(waiting[0])):
                waiting.pop(0)
                continue
        except aiohttp.ClientError:
            pass
        await asyncio.sleep(_POLL_S)


async def _is_ready(session: aiohttp.ClientSession, address: str) -> bool:
    """Return whether a member can be asked for every adapter; a router hears of them after its nodes."""
    async with session.get(f"{address}/health") as response:
        if response.status != 200:
            return False
    async with session.get(f"{address}/v1/models") as response:
        listed = await response.json()
    return set(adapter_folders()) <= {model["id"] for model in listed["data"]}
