"""Do harm to members of a cluster: kill, end or halt their processes; cut, part or slow their links.

Faults come at random, and may overlap. Each is recorded when it is over. Where only one router or only one node serves,
that one is left alone: nothing answers without them.
"""

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable
from random import Random

import aiohttp

from scripts.chaos.cluster_processes import ClusterProcesses
from scripts.chaos.records import FaultRecord

KILLED, ENDED, HALTED = "killed", "told to end", "halted"
CUT, PARTED, SLOWED = "cut off", "parted", "slowed"
_PROCESS_FAULTS = {KILLED: 3, ENDED: 1, HALTED: 1}
_LINK_FAULTS = {CUT: 1, PARTED: 1, SLOWED: 1}
_HALT_S = (0.5, 6.0)  # routers wait 2 s for a silent node
_LINK_S = (1.0, 8.0)
_EXCUSED_S = 15.0  # after a fault, in which clients may find its router gone
_READY_S = 90.0
_POLL_S = 0.2
_TIMES = aiohttp.ClientTimeout(total=2.0)


class FaultInjection:
    """What happens to the members of one cluster. Used on one event loop."""

    def __init__(
        self, cluster: ClusterProcesses, session: aiohttp.ClientSession, began_s: float, rng: Random
    ) -> None:
        """Do nothing yet; times are recorded from `began_s` on."""
        self.records: list[FaultRecord] = []
        self._cluster, self._session, self._began_s, self._rng = cluster, session, began_s, rng
        self._harmed: set[str] = set()  # members that a fault lasts for now
        self._troubled: dict[str, float] = {}  # members, and until when what is seen of them is excused

    def is_troubled(self, member: str) -> bool:
        """Tell whether a client may find that member gone or silent."""
        return time.monotonic() < self._troubled.get(member, 0.0)

    async def strike(self, every_s: float, until_s: float) -> None:
        """Begin a fault every `every_s` in the mean, until then; return when all are over."""
        running: list[asyncio.Task[None]] = []
        while True:
            pause_s = self._rng.expovariate(1 / every_s)
            if time.monotonic() + pause_s > until_s:
                break
            await asyncio.sleep(pause_s)
            if (chosen := await self._choose()) is not None:
                kind, name = chosen
                harm = self._harm_process if kind in _PROCESS_FAULTS else self._harm_link
                running.append(asyncio.create_task(harm(kind, name)))
        await asyncio.gather(*running)

    async def roll(self, until_s: float) -> None:
        """Tell one member after another to end, each when the one before it serves again; at least once each."""
        members = [name for name in self._cluster.plan.names if name != "coordinator"]
        for name in [*members, "coordinator"]:
            await self._restart(name)
        while time.monotonic() < until_s:
            await self._restart(self._rng.choice(members))

    async def _restart(self, name: str) -> None:
        async def restarted() -> None:
            starts = self._cluster.starts[name]
            self._cluster.send(name, signal.SIGTERM)
            async with asyncio.timeout(_READY_S):
                while self._cluster.starts[name] == starts or not await self._serves(name):
                    await asyncio.sleep(_POLL_S)

        await self._record(ENDED, (name,), restarted)

    async def _serves(self, name: str) -> bool:
        if name == "coordinator":
            return True  # whoever needs it waits for it
        try:
            async with self._session.get(f"{self._cluster.address(name)}/health", timeout=_TIMES) as response:
                return response.status == 200
        except (aiohttp.ClientError, ConnectionError, TimeoutError):
            return False

    async def _choose(self) -> tuple[str, str] | None:
        """Draw what to do to whom; None if that member is to be left alone now."""
        kinds = _PROCESS_FAULTS | (_LINK_FAULTS if self._cluster.network is not None else {})
        kind = self._rng.choices(list(kinds), list(kinds.values()))[0]
        name = self._rng.choice(self._cluster.plan.names)
        return (kind, name) if name not in self._harmed and await self._is_spare(name) else None

    async def _is_spare(self, name: str) -> bool:
        """Tell whether another member of the same role serves, and is left alone now."""
        role = name.rpartition("-")[0]
        if not role:
            return True  # the coordinator: what it told stays in force
        busy = {name, *self._harmed}
        others = [each for each in self._cluster.plan.names if each.startswith(role) and each not in busy]
        return any(await asyncio.gather(*(self._serves(each) for each in others)))

    async def _harm_process(self, kind: str, name: str) -> None:
        numbers = {KILLED: signal.SIGKILL, ENDED: signal.SIGTERM, HALTED: signal.SIGSTOP}
        halt_s = self._rng.uniform(*_HALT_S) if kind == HALTED else 0.0
        pid = self._cluster.pid(name)
        if pid is None:
            return  # it is on its way back from an earlier fault

        async def harm() -> None:
            self._cluster.send(name, numbers[kind])
            await asyncio.sleep(halt_s)
            if kind == HALTED and self._cluster.pid(name) == pid:
                self._cluster.send(name, signal.SIGCONT)

        await self._record(kind, (name,), harm)

    async def _harm_link(self, kind: str, name: str) -> None:
        network = self._cluster.network
        assert network is not None, "only a network has links"
        others = [each for each in self._cluster.plan.names if each not in {name, *self._harmed}]
        other = self._rng.choice(others) if others else name
        if other == name:
            return
        who = (name, other) if kind == PARTED else (name,)
        last_s = self._rng.uniform(*_LINK_S)
        begin, end = {
            CUT: (lambda: network.cut(name), lambda: network.mend(name)),
            PARTED: (lambda: network.part(name, other), lambda: network.join(name, other)),
            SLOWED: (lambda: network.slow(name), lambda: network.hasten(name)),
        }[kind]

        async def harm() -> None:
            begin()
            try:
                await asyncio.sleep(last_s)
            finally:
                end()

        await self._record(kind, who, harm)

    async def _record(self, kind: str, who: tuple[str, ...], harm: Callable[[], Awaitable[None]]) -> None:
        began_s = time.monotonic()
        self._harmed.update(who)
        for member in who:
            self._troubled[member] = float("inf")
        try:
            await harm()
        finally:
            ended_s = time.monotonic()
            self._harmed.difference_update(who)
            for member in who:
                self._troubled[member] = ended_s + _EXCUSED_S
            self.records.append(
                FaultRecord(kind, "+".join(who), began_s - self._began_s, ended_s - self._began_s)
            )
