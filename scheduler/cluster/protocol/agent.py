"""The node's side of the cluster's protocol: obeys commands in order, keeps the latest table, accounts for
itself.

Pure, so that live nodes, the simulator and the tests run the same lines. It does not move bytes: `receive`
says what is to be fetched or freed, and whoever does it calls back.
"""

from dataclasses import dataclass
from enum import Enum

from lora.adapter import AdapterRef
from scheduler.cluster.protocol.delivery import Inbox
from scheduler.cluster.protocol.messages import (
    AllowLeave,
    Command,
    Drop,
    NodeHardware,
    Publish,
    Pull,
    Rejoin,
    Report,
)
from scheduler.cluster.state import EMPTY_TABLE, RoutingTable


@dataclass(frozen=True, slots=True)
class Fetch:
    """Get `adapter` from the first of `sources` that has it, else from the registry; then `arrived` or
    `failed`."""

    adapter: AdapterRef
    sources: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Free:
    """Free `adapter` when no request runs on it any more, then call `freed`; not if it is kept again by
    then."""

    adapter: AdapterRef


@dataclass(frozen=True, slots=True)
class Depart:
    """The node may go."""


Action = Fetch | Free | Depart


class _Hold(Enum):
    LOADING = 1
    KEPT = 2
    DRAINING = 3


class NodeAgent:
    """What one node holds on the coordinator's behalf, and the table it routes by. `session` is to be larger
    each time the node starts (the milliseconds it starts at, say)."""

    def __init__(self, node: str, machine: NodeHardware, session: int = 1) -> None:
        self.node, self.table = node, EMPTY_TABLE
        self._machine = machine
        self._inbox = Inbox(session)
        self._reports = 0
        self._holds: dict[AdapterRef, _Hold] = {}
        self._taken: dict[AdapterRef, int] = {}
        self._news: dict[AdapterRef, int] = {}

    @property
    def session(self) -> int:
        """Return the session under which this node reports."""
        return self._inbox.session

    @property
    def used_bytes(self) -> int:
        """Sum up the bytes of all that is here or on its way."""
        return sum(ref.nbytes for ref in self._holds)

    def receive(self, command: Command) -> list[Action]:
        """Return what is to be done now, in order; repeats and commands of other sessions ask for nothing."""
        match command:
            case Publish(table=table):
                self._adopt(table)
            case Rejoin(session=session, next_session=following):
                if session == self.session:
                    self._rejoin(following)
            case _:
                return [action for due in self._inbox.receive(command) for action in self._obey(due)]
        return []

    def keeps(self, adapter: AdapterRef) -> bool:
        """Return whether `adapter` is here and is to stay."""
        return self._holds.get(adapter) is _Hold.KEPT

    def has(self, adapter: AdapterRef) -> bool:
        """Return whether `adapter` is here, to stay or not."""
        return self._holds.get(adapter) in (_Hold.KEPT, _Hold.DRAINING)

    def holds(self, adapter: AdapterRef) -> bool:
        """Return whether `adapter` is here or on its way on the coordinator's behalf."""
        return adapter in self._holds

    def arrived(self, adapter: AdapterRef) -> None:
        """Note that its bytes are here; of no account if it was dropped meanwhile."""
        if self._holds.get(adapter) is _Hold.LOADING:
            self._holds[adapter] = _Hold.KEPT

    def failed(self, adapter: AdapterRef) -> None:
        """Note that it could not be had; the coordinator will see and decide."""
        if self._holds.get(adapter) is _Hold.LOADING:
            del self._holds[adapter]

    def displaced(self, adapter: AdapterRef) -> None:
        """Take in that its pages went to another: what is to stay is on its way again, what was dropped is gone."""
        hold = self._holds.pop(adapter, None)
        if hold is not None and hold is not _Hold.DRAINING:
            self._holds[adapter] = _Hold.LOADING

    def freed(self, adapter: AdapterRef) -> None:
        """Note that its bytes are gone."""
        assert not self.keeps(adapter), f"{adapter.name!r} was freed although it is to be kept"
        self._holds.pop(adapter, None)

    def took(self, adapter: AdapterRef, tokens: int) -> None:
        """Count input or output tokens of work that this node took in."""
        self._taken[adapter] = self._news[adapter] = self._taken.get(adapter, 0) + tokens

    def report(self, slowdown: float = 1.0, cached: tuple[AdapterRef, ...] = ()) -> Report:
        """Return the next report; what its steps cost and what it has cached is for the caller to say.

        Totals that changed since the last are in it; a lost one's come with the next change.
        """
        self._reports += 1
        news, self._news = self._news, {}
        return Report(
            node=self.node,
            session=self.session,
            number=self._reports,
            machine=self._machine,
            applied=self._inbox.applied,
            table_version=self.table.version,
            held=tuple(ref for ref, hold in self._holds.items() if hold is not _Hold.LOADING),
            loading=tuple(ref for ref, hold in self._holds.items() if hold is _Hold.LOADING),
            cached=cached,
            taken=tuple(news.items()),
            slowdown=slowdown,
        )

    def _adopt(self, table: RoutingTable) -> None:
        if table.version > self.table.version:
            self.table = table

    def _rejoin(self, session: int) -> None:
        """Begin a session: what is here is kept until told otherwise.

        So is what was draining, since a coordinator that knows of no drop would count on it.
        """
        self._inbox = Inbox(session)
        self._holds = {
            ref: _Hold.LOADING if hold is _Hold.LOADING else _Hold.KEPT for ref, hold in self._holds.items()
        }
        self._reports = 0
        self._taken, self._news = {}, {}

    def _obey(self, command: Pull | Drop | AllowLeave) -> list[Action]:
        match command:
            case Pull(adapter=adapter, sources=sources):
                hold = self._holds.get(adapter)
                self._holds[adapter] = _Hold.KEPT if hold is _Hold.DRAINING else hold or _Hold.LOADING
                return [] if hold else [Fetch(adapter, sources)]
            case Drop(adapter=adapter):
                if self._holds.get(adapter) is _Hold.KEPT:
                    self._holds[adapter] = _Hold.DRAINING
                    return [Free(adapter)]
                if self._holds.get(adapter) is _Hold.LOADING:
                    del self._holds[adapter]
                return []
            case AllowLeave():
                return [Depart()]
