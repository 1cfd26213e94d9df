"""Carry out on a node what the coordinator says: the agent decides, the store fetches and frees, and threads wait.

The agent is the event loop's. The store calls back from its own threads; what it says is handed to the loop.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Protocol

from engine.cluster.control.ask_messages import Answer, Ask
from engine.cluster.control.control_values import WireEntry
from engine.cluster.node.node_adapters import PlacedSource, learn
from engine.cluster.node.node_names import NodeNames
from engine.cluster.view import ClusterView
from engine.errors import EngineError
from engine.runner.step_costs import StepCosts
from engine.waiting.task_pool import TaskPool
from lora.adapter import AdapterRef
from scheduler.cluster.protocol.agent import Action, Depart, Fetch, Free, NodeAgent
from scheduler.cluster.protocol.messages import Command, Drop, Pull, Report
from transport.base import Address

_FETCHES = 4  # at once: each waits for a peer
_FETCH_S = 120.0
_log = logging.getLogger(__name__)


class PlacedContents(PlacedSource, Protocol):
    """The part of a node's store that a coordinator rules. What learns blocks; all may be called from any thread."""

    def keep(self, ref: AdapterRef) -> None:
        """Keep a known content, and have it fetched when there is room."""
        ...

    def drop(self, ref: AdapterRef) -> None:
        """Keep a content no more."""
        ...

    def tiers(self) -> Mapping[str, str]:
        """Tell where each content is, by digest."""
        ...


class AgentRunner:
    """ControlledNode of a store. Used on one event loop, but for what the store calls."""

    def __init__(
        self,
        agent: NodeAgent,
        placed: PlacedContents,
        retained: Callable[[], Set[str]],
        names: NodeNames,
        view: ClusterView,
        costs: StepCosts | None = None,
    ) -> None:
        """Obey by `placed`; `retained` tells the digests that requests use, `learnt` what steps turn out to cost."""
        self.agent, self.view = agent, view
        self.may_go = asyncio.Event()
        self.is_leaving = False
        self._placed, self._retained, self._names, self._costs = placed, retained, names, costs
        self._pool = TaskPool("placement", _FETCHES, _FETCH_S)
        self._loop = asyncio.get_running_loop()
        self._fetching: dict[AdapterRef, asyncio.Task[None]] = {}
        self._draining: dict[AdapterRef, None] = {}
        self._known: dict[str, AdapterRef] = {}

    @property
    def session(self) -> int:
        """Return the session under which the node reports."""
        return self.agent.session

    def declared(self) -> Mapping[str, str]:
        """Return the names from the node's own options and folders, with digests, "" where none was read."""
        return self._names.declared()

    def report(self) -> Report:
        """Return the next report."""
        self._end_drains()
        tiers = self._placed.tiers()
        refs = (self._known.get(digest) for digest, tier in tiers.items() if tier == "device")
        cached = tuple(ref for ref in refs if ref is not None and not self.agent.holds(ref))
        self._known = {
            digest: ref for digest, ref in self._known.items() if digest in tiers or self.agent.holds(ref)
        }
        costs = self._costs
        if costs is None:
            return self.agent.report(cached=cached)
        costs.rest_if_idle()
        return self.agent.report(costs.slowdown, cached)

    def took(self, ref: AdapterRef, tokens: int) -> None:
        """Count input or output tokens of work that this node took in."""
        self.agent.took(ref, tokens)

    def obey(self, command: Command) -> None:
        """Do what the coordinator says, or begin to."""
        for action in self.agent.receive(command):
            self._do(action)
        # A pull that is called off leaves the agent nothing to free, and the store something to drop.
        if isinstance(command, Drop) and not self.agent.holds(command.adapter):
            self._placed.drop(command.adapter)
        if isinstance(command, Pull):
            self._known[command.adapter.digest] = command.adapter
        self._end_drains()

    async def answer(self, ask: Ask) -> Answer:
        """Do what the coordinator asks concerning a name of this node's."""
        try:
            match ask.act:
                case "resolve":
                    entry = await self._names.resolve(ask.name)
                case "load":
                    entry = await self._names.load(ask.name, ask.folder, ask.replaces)
                case _:
                    await self._names.unload(ask.name)
                    return Answer(ask.number)
        except EngineError as error:
            return Answer.failed(ask.number, error)
        except Exception as error:  # noqa: BLE001 - whoever asked must hear of it
            _log.exception("what the coordinator asked of %s could not be done", ask.name)
            return Answer.failed(
                ask.number, EngineError(f"{type(error).__name__}: the node's log has the cause")
            )
        return Answer(ask.number, WireEntry.of(entry))

    def arrived(self, ref: AdapterRef) -> None:
        """Take in, from any thread, that a content is here."""
        self._loop.call_soon_threadsafe(self.agent.arrived, ref)

    def displaced(self, ref: AdapterRef) -> None:
        """Take in, from any thread, that a content gave way to what requests need."""
        self._loop.call_soon_threadsafe(self.agent.displaced, ref)

    def failed(self, ref: AdapterRef, error: Exception) -> None:
        """Take in, from any thread, that a content cannot be had."""
        self._loop.call_soon_threadsafe(self._fail, ref, error)

    async def leave(self, timeout_s: float) -> bool:
        """Ask to go, and serve on until the coordinator allows it or the time is over; tell which it was."""
        self.is_leaving = True
        try:
            async with asyncio.timeout(timeout_s):
                await self.may_go.wait()
        except TimeoutError:
            _log.warning("the coordinator has not let this node go within %g s: it goes by itself", timeout_s)
            return False
        return True

    async def close(self) -> None:
        """Fetch nothing more."""
        for task in self._fetching.values():
            task.cancel()
        await asyncio.gather(*self._fetching.values(), return_exceptions=True)
        self._pool.close()

    def _do(self, action: Action) -> None:
        match action:
            case Fetch(adapter=adapter, sources=sources):
                self._draining.pop(adapter, None)
                self._start_fetch(adapter, sources)
            case Free(adapter=adapter):
                self._draining[adapter] = None
                self._placed.drop(adapter)
            case Depart():
                self.may_go.set()

    def _start_fetch(self, ref: AdapterRef, sources: Sequence[str]) -> None:
        before = self._fetching.pop(ref, None)
        if before is not None:
            before.cancel()
        task = self._fetching[ref] = asyncio.create_task(self._fetch(ref, sources))
        task.add_done_callback(lambda done: self._fetched(ref, done))

    def _fetched(self, ref: AdapterRef, task: asyncio.Task[None]) -> None:
        if self._fetching.get(ref) is task:
            del self._fetching[ref]

    async def _fetch(self, ref: AdapterRef, sources: Sequence[str]) -> None:
        """Come to know and keep a content; the store says when it has arrived."""
        addresses = self._addresses(sources)

        def learn_and_keep() -> None:
            learn(self._placed, self.view, ref, addresses)
            self._placed.keep(ref)

        try:
            await self._pool.run(learn_and_keep)
        except Exception as error:  # noqa: BLE001 - whatever it is ends this fetch alone, and the coordinator sees it
            self._fail(ref, error)
        else:
            if self._placed.tiers().get(ref.digest) == "device":
                self.agent.arrived(ref)  # it was here before
        if not self.agent.holds(ref):
            self._placed.drop(ref)

    def _addresses(self, sources: Sequence[str]) -> tuple[Address, ...]:
        """Return where to pull from: the sources that were named, then every other member that publishes."""
        others = (name for name in self.view.members if name not in sources and name != self.agent.node)
        members = (self.view.members.get(name) for name in (*sources, *others))
        told = (member.peer_address for member in members if member is not None)
        return tuple(_address(address) for address in told if address is not None)

    def _fail(self, ref: AdapterRef, error: Exception) -> None:
        _log.warning("adapter %s could not be fetched: %s", ref.name, error)
        self.agent.failed(ref)

    def _end_drains(self) -> None:
        """Let the agent know which dropped contents no request uses any more."""
        used = self._retained() if self._draining else ()
        for ref in tuple(self._draining):
            if self.agent.keeps(ref):  # it was ordered anew meanwhile, and the store may have forgotten it
                del self._draining[ref]
                self.agent.displaced(ref)
                self._start_fetch(ref, ())
            elif ref.digest not in used:
                del self._draining[ref]
                self.agent.freed(ref)


def _address(text: str) -> Address:
    host, _, port = text.rpartition(":")
    return Address(host, int(port) if port.isdecimal() else 0)
