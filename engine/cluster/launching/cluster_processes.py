"""Keep the processes of a cluster on this machine: start and end them in order, and as many nodes as are wanted.

Of nodes that are too many the youngest goes. What it holds the others held before it came, mostly, and may have kept;
and what lasts longest is where requests find warm caches. It drains before it ends, so nothing it runs is lost.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from engine.cluster.launching.kept_process import KeptProcess
from engine.cluster.launching.member_lines import KINDS
from engine.cluster.size_call import SizeTold

_ASK_S = 1.0
_log = logging.getLogger(__name__)
AskSize = Callable[[int], Awaitable[SizeTold | None]]
"""Asks how many nodes are wanted, while so many run; None if nobody can say."""


class ClusterProcesses:
    """The processes, and whether they are to run. Used on one event loop."""

    def __init__(
        self, first: Sequence[KeptProcess], make_node: Callable[[int], KeptProcess], drain_s: float
    ) -> None:
        """Keep `first`, once run; `make_node` makes the process of the node of a number."""
        self._kept = list(first)
        self._make_node, self._drain_s = make_node, drain_s
        self._watchers: dict[KeptProcess, asyncio.Task[None]] = {}
        self._draining: dict[KeptProcess, asyncio.Task[None]] = {}
        self._stopping = asyncio.Event()

    @property
    def nodes(self) -> list[KeptProcess]:
        """List the nodes that are to stay, the oldest first."""
        return [each for each in self._kept if each.name.startswith("node") and each not in self._draining]

    async def run(self, ask: AskSize | None = None) -> int:
        """Start all, watch them, and stop them when told to; with `ask` nodes come and go meanwhile."""
        for each in self._kept:
            self._watch(each)
        following = asyncio.create_task(self._follow(ask)) if ask is not None else None
        try:
            await self._stopping.wait()
            if following is not None:
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)
            for kind in KINDS:
                ending = [each for each in self._kept if each.name.startswith(kind)]
                await asyncio.gather(*(self._drain(each) for each in ending))
        finally:
            for task in self._watchers.values():
                task.cancel()
            await asyncio.gather(*self._watchers.values(), return_exceptions=True)
            for each in self._kept:
                each.kill()
        return 0

    def stop(self) -> None:
        """Have all drain and end; when called again, end them at once."""
        for each in self._kept:
            if self._stopping.is_set():
                each.kill()
            else:
                each.start_no_more()
        self._stopping.set()

    async def _follow(self, ask: AskSize) -> None:
        """Have as many nodes run as are wanted, for as long as this runs."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_ASK_S):
                    await self._stopping.wait()
                    return
            told = await ask(len(self.nodes))
            if told is not None and not self._stopping.is_set():
                self._resize(told)

    def _resize(self, told: SizeTold) -> None:
        before = len(self.nodes)
        if told.wanted == before:
            return
        _log.info("%d nodes are wanted and %d run: %s", told.wanted, before, told.reason)
        for _ in range(told.wanted - before):
            node = self._make_node(self._free_number())
            self._kept.append(node)
            self._watch(node)
            _log.info("%s is started", node.name)
        for node in reversed(self.nodes[told.wanted :]):
            _log.info("%s is drained, then ended", node.name)
            self._drain(node)

    def _free_number(self) -> int:
        """Return the least number that no node has, be it one that drains."""
        names = {each.name for each in self._kept}
        return next(at for at in range(len(names) + 1) if f"node-{at}" not in names)

    def _watch(self, each: KeptProcess) -> None:
        self._watchers[each] = asyncio.create_task(each.run())

    def _drain(self, each: KeptProcess) -> asyncio.Task[None]:
        """Return what ends a process, which is told so once: a second time would end it at once."""
        if each not in self._draining:
            self._draining[each] = asyncio.create_task(self._end(each))
        return self._draining[each]

    async def _end(self, each: KeptProcess) -> None:
        await each.end(self._drain_s)
        if self._stopping.is_set():
            return
        _log.info("%s has ended", each.name)
        self._kept.remove(each)
        del self._draining[each], self._watchers[each]
