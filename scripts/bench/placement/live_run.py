"""Ask a live cluster under one policy, and read what it held and moved meanwhile."""

import asyncio
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from statistics import fmean
from typing import Any

import aiohttp

from lora.adapter import AdapterRef
from scripts.chaos.cluster_processes import ClusterPlan, ClusterProcesses
from scripts.chaos.load import ClientLoad
from scripts.chaos.questions import Answers, Asked
from scripts.chaos.records import Records

_READY_S = 300.0
_SETTLED_S = 5.0  # after all is known: the first plan is carried out
_TIMES = aiohttp.ClientTimeout(total=5.0)
_PULLED = re.compile(r"^loraserve_peer_pulled_bytes_total ([0-9.e+]+)$", re.MULTILINE)


@dataclass(slots=True)
class LiveFigures:
    """What came of a run: answers, and bytes held by all nodes, a sample a second, and pulled from peers."""

    records: Records
    adapters: tuple[AdapterRef, ...]
    held_bytes: list[int] = field(default_factory=list[int])
    moved_bytes: int = 0

    @property
    def mean_held_bytes(self) -> float:
        """Return the mean over the run."""
        return fmean(self.held_bytes or [0])


class LiveRun:
    """One cluster under one load. Used on one event loop."""

    def __init__(self, plan: ClusterPlan, asked: Sequence[Asked], answers: Answers, seed: int) -> None:
        self._cluster = ClusterProcesses(plan, None)
        self._plan, self._asked, self._answers, self._rng = plan, asked, answers, Random(seed)

    async def run(self, adapters: int) -> LiveFigures:
        """Start the cluster, ask everything, end the cluster. Raises ValueError if it never gets ready."""
        self._cluster.start()
        try:
            connector = aiohttp.TCPConnector(force_close=True, limit=0)
            async with aiohttp.ClientSession(connector=connector) as session:
                refs = await self._wait_ready(session, adapters)
                await asyncio.sleep(_SETTLED_S)
                before = await self._pulled_bytes(session)
                routers = {name: self._cluster.address(name) for name in self._cluster.routers}
                load = ClientLoad(session, routers, self._answers, lambda member: False, self._rng)
                figures = LiveFigures(load.records, refs)
                sampling = asyncio.create_task(self._sample(session, figures))
                try:
                    await load.play(self._asked, time.monotonic())
                finally:
                    sampling.cancel()
                figures.moved_bytes = await self._pulled_bytes(session) - before
                return figures
        finally:
            await self._cluster.stop()

    async def _wait_ready(self, session: aiohttp.ClientSession, adapters: int) -> tuple[AdapterRef, ...]:
        """Wait until all nodes serve and each adapter is in the catalogue; return the adapters."""
        deadline_s = time.monotonic() + _READY_S
        while time.monotonic() < deadline_s:
            try:
                told = await self._get(session, "/cluster")
                if len(told["nodes"]) == self._plan.nodes:
                    refs = await self._catalogue(session)
                    if len(refs) >= adapters:
                        return refs
            except (aiohttp.ClientError, ConnectionError, TimeoutError, KeyError):
                pass
            await asyncio.sleep(0.5)
        raise ValueError(f"not ready within {_READY_S:g} s: see the logs in {self._plan.work}")

    async def _catalogue(self, session: aiohttp.ClientSession) -> tuple[AdapterRef, ...]:
        refs, after = list[AdapterRef](), ""
        while True:
            page = await self._get(session, f"/v1/adapters?limit=1000{after}")
            refs += [
                AdapterRef(each["digest"], each["name"], each["rank"], (), each["bytes"])
                for each in page["data"]
            ]
            if not page["has_more"]:
                return tuple(refs)
            after = f"&after={page['next']}"

    async def _sample(self, session: aiohttp.ClientSession, figures: LiveFigures) -> None:
        while True:
            await asyncio.sleep(1.0)
            try:
                told = await self._get(session, "/cluster")
            except (aiohttp.ClientError, ConnectionError, TimeoutError):
                continue
            figures.held_bytes.append(sum(int(node["used_bytes"]) for node in told["nodes"]))

    async def _pulled_bytes(self, session: aiohttp.ClientSession) -> int:
        """Return what all nodes have pulled from peers since they started."""
        total = 0
        for name in self._plan.names:
            if name.startswith("node"):
                async with session.get(f"{self._cluster.address(name)}/metrics", timeout=_TIMES) as response:
                    found = _PULLED.search(await response.text())
                total += int(float(found.group(1))) if found is not None else 0
        return total

    async def _get(self, session: aiohttp.ClientSession, path: str) -> Mapping[str, Any]:
        address = self._cluster.address(self._cluster.routers[0])
        async with session.get(address + path, timeout=_TIMES) as response:
            return await response.json()
