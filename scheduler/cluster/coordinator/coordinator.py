"""The coordinator: events in, commands out. Decides where adapters live and publishes where requests go.

Its state is soft: a new one learns all from reports and the registry, and for `settle_s` only listens. Nodes are
believed dead when they have been silent for `dead_after_s` or were reported crashed, and must then rejoin. Everything
it sends is sent again until a report shows that it arrived. It knows no carrier of messages. The same events at the
same times give the same commands. A report costs as it is long, a tick as there are nodes, a plan as adapters."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from lora.adapter import AdapterRef
from scheduler.cluster.coordinator.cluster_size import ClusterSize
from scheduler.cluster.coordinator.demand import DemandSource
from scheduler.cluster.coordinator.node_view import Copy, NodeView, RouterView
from scheduler.cluster.coordinator.planning import PlacementPlans
from scheduler.cluster.coordinator.replan import Replanner
from scheduler.cluster.coordinator.rollout import Rollout
from scheduler.cluster.protocol.messages import (
    AdapterAdded,
    AdapterDeleted,
    AdapterPinned,
    AllowLeave,
    Command,
    Crash,
    Event,
    Leave,
    Publish,
    Rejoin,
    Report,
    RouterReport,
    Tick,
)
from scheduler.cluster.state import RoutingTable


@dataclass(frozen=True, slots=True)
class CoordinatorOptions:
    """Tables are published no more often than every `publish_s`; `max_pulls` run at once on one node; what
    waits for memory while nothing else moves is given up after `stuck_s`. A node that asked to go may go after
    `leave_s` even if others lack the memory for what it has: they read that from its source when asked."""

    settle_s: float = 3.0
    dead_after_s: float = 5.0
    retry_s: float = 1.0
    publish_s: float = 0.2
    stuck_s: float = 5.0
    leave_s: float = 10.0
    max_pulls: int = 16


class Coordinator:
    """One per cluster; give it a `Tick` about once a second.

    `epoch` is to be larger for each one that follows another (the second it starts in, say). So what its
    forerunners sent and is still under way is told from its own.
    """

    def __init__(
        self, planner: Replanner, demand: DemandSource, options: CoordinatorOptions, epoch: int = 0
    ) -> None:
        self._planner, self._demand, self._options = planner, demand, options
        self._members: dict[str, NodeView] = {}
        self._routers: dict[str, RouterView] = {}
        self._rollout = Rollout(self._members, self._routers, options.max_pulls, planner.options.headroom)
        self.plans = PlacementPlans(planner, demand, self._members, self._rollout)
        self.size = ClusterSize(self.plans.problem, planner.need)
        self._first_session = self._rollout.version = epoch << 32
        self._over: dict[str, int] = {}  # the last session of each node that ended
        self._started_s: float | None = None
        self._settled = False
        self._published_s = float("-inf")
        self._table = RoutingTable(0, MappingProxyType({}))

    @property
    def table(self) -> RoutingTable:
        """Return the routing table published last."""
        return self._table

    def copies(self, adapter: AdapterRef) -> dict[str, Copy]:
        """Return what is believed of the adapter's copies, by node."""
        found = ((node, member.copies.get(adapter)) for node, member in self._members.items())
        return {node: copy for node, copy in found if copy is not None}

    def session(self, node: str) -> int | None:
        """Return the session of a node believed alive."""
        return self._members[node].session if node in self._members else None

    def is_leaving(self, node: str) -> bool:
        """Tell whether a node believed alive has asked to go."""
        return node in self._members and self._members[node].leaving

    def load(self, node: str) -> float | None:
        """Return the part of a node's time that the last plan gave to it; None before there was one."""
        return self._rollout.load.get(node)

    def on_event(self, event: Event, now: float) -> list[Command]:
        """Return what is to be sent, in order, now that `event` has come; `now` in seconds never goes back."""
        if self._started_s is None:
            self._started_s = now
        match event:
            case Report():
                commands = self._hear(event, now)
            case RouterReport():
                commands = self._hear_router(event, now)
            case Crash(node=node, session=session):
                commands = self._lose(node, session, now)
            case Leave(node=node, session=session):
                commands = self._part(node, session, now)
            case AdapterAdded(adapter=adapter):
                commands = self._add(adapter, now)
            case AdapterDeleted(adapter=adapter):
                commands = self._delete(adapter, now)
            case AdapterPinned(adapter=adapter, copies=copies):
                self.plans.pin(adapter, copies)  # the next plan sees it, and comes soon
                commands = []
            case Tick():
                commands = self._tick(now)
        return commands + self._publish(now)

    def _hear(self, report: Report, now: float) -> list[Command]:
        member = self._members.get(report.node)
        if member is None or report.session > member.session:
            return self._greet(report, now)
        if report.session < member.session or not member.is_news(report):
            return []
        self._take_in(member, report, now)
        commands = self._advance(self._absorb(member, report, now), now)
        if member.released and not len(member.outbox):
            return commands + self._lose(member.node, member.session, now)
        return commands + (self._rollout.fill(member, now) if self._settled else [])

    def _greet(self, report: Report, now: float) -> list[Command]:
        """Let the node join if its session is its first word to this coordinator, so that no command of it
        can be under way; else tell it to begin one that is."""
        lowest = max(self._first_session, self._over.get(report.node, 0) + 1)
        if report.session >= lowest and report.number == 1:
            return self._join(report, now)
        return [Rejoin(report.node, report.session, max(lowest, report.session + 1))]

    def _join(self, report: Report, now: float) -> list[Command]:
        """Begin a node's session. What it held in the one before counts only as it now says."""
        gone = self._forget(report.node, now)
        member = self._members[report.node] = NodeView(report, now)
        self._planner.hurry("node_joined", must=self._settled)
        self._take_in(member, report, now)
        homeless = self._rollout.adapters if len(self._members) == 1 else ()
        return self._advance(dict.fromkeys((*gone, *self._absorb(member, report, now), *homeless)), now)

    def _absorb(self, member: NodeView, report: Report, now: float) -> list[AdapterRef]:
        changed = member.absorb(report, now)
        if any(ref in member.failed for ref in changed):
            self._planner.note("failed_load")
        self._rollout.changed(member, changed, now)
        return changed

    def _take_in(self, member: NodeView, report: Report, now: float) -> None:
        """Learn demand, slowdown and the table's version from a report."""
        self._demanded(taken := member.newly_taken(report), now)
        self.size.count(taken, False, now)
        if member.update_slowdown(report.slowdown):
            self._planner.hurry("node_pace")
        self._outnumber(report.table_version)

    def _outnumber(self, table_version: int) -> None:
        """Let the next table be newer than one that is in use."""
        if table_version > self._rollout.version:
            self._rollout.version, self._rollout.dirty = table_version, True

    def _hear_router(self, report: RouterReport, now: float) -> list[Command]:
        """Learn of a router, of the table it routes by, and of what was asked of it in vain."""
        before = known = self._routers.get(report.router)
        if known is None or report.session > known.session:
            known = self._routers[report.router] = RouterView(report.session)
        if report.session == known.session:
            self._demanded(refused := known.absorb(report, now), now)
            self.size.count(refused if before else (), True, now)  # a new one may tell of what is long past
            self._outnumber(report.table_version)
        return []

    def _demanded(self, tokens: Iterable[tuple[AdapterRef, int]], now: float) -> None:
        """Count tokens that were asked for."""
        for ref, count in tokens:
            if ref in self._rollout.adapters and self._demand.observe(ref, count, now):
                self._planner.hurry("demand")

    def _lose(self, node: str, session: int, now: float) -> list[Command]:
        member = self._members.get(node)
        self._over[node] = max(session, self._over.get(node, 0))
        if member is None or session < member.session:
            return []
        self._planner.hurry("node_left", must=True)
        return self._advance(self._forget(node, now), now)

    def _forget(self, node: str, now: float) -> list[AdapterRef]:
        """End the node's session; returns the adapters that had to do with it."""
        member = self._members.pop(node, None)
        if member is None:
            return []
        self._over[node] = max(member.session, self._over.get(node, 0))
        self._rollout.load.pop(node, None)
        self._rollout.changed(member, member.copies, now)
        return list(dict.fromkeys((*member.copies, *member.waiting)))

    def _part(self, node: str, session: int, now: float) -> list[Command]:
        member = self._members.get(node)
        if member is None or session != member.session or member.leaving:
            return []
        member.leave_by_s = now + self._options.leave_s
        self._planner.hurry("node_left", must=True)
        return self._advance(list(member.copies), now)

    def _add(self, adapter: AdapterRef, now: float) -> list[Command]:
        assert not adapter.is_base, "the base model is everywhere and is not placed"
        self._rollout.register(adapter)
        self._demand.add(adapter)
        return self._advance([adapter], now)

    def _delete(self, adapter: AdapterRef, now: float) -> list[Command]:
        self.plans.pin(adapter, 0)
        if adapter in self._rollout.adapters:
            self._demand.remove(adapter)
        self._rollout.delete(adapter)
        return self._advance([adapter], now)

    def _advance(self, adapters: Iterable[AdapterRef], now: float) -> list[Command]:
        if not self._settled:
            return []
        return [command for ref in list(adapters) for command in self._rollout.advance(ref, now)]

    def _tick(self, now: float) -> list[Command]:
        options = self._options
        silent = [each for each in self._members.values() if now - each.seen_s > options.dead_after_s]
        commands = [command for each in silent for command in self._lose(each.node, each.session, now)]
        gone = [name for name, each in self._routers.items() if now - each.seen_s > options.dead_after_s]
        for router in gone:
            del self._routers[router]
        able = [ref for each in self._members.values() for ref in each.take_able(now)]
        if not self._settled:
            return commands + self._settle(now)
        commands += self._advance(dict.fromkeys(able), now)
        if self._planner.due(now):
            commands += self._advance(self.plans.make(now), now)
        commands += self._rollout.retire(now)
        if now - self._rollout.moved_s > options.stuck_s:
            commands += self._rollout.give_up_waiting(now)
        return commands + self._release(now) + self._repeat(now)

    def _settle(self, now: float) -> list[Command]:
        """Take what nodes hold for the placement that is, once they have been listened to long enough."""
        assert self._started_s is not None
        if now - self._started_s < self._options.settle_s:
            return []
        self._settled = True
        held = {ref: self._rollout.held(ref) for ref in self._rollout.adapters}
        self._rollout.target.update(held)
        self._planner.hurry("start", must=not all(held.values()))
        return self._advance((*self.plans.make(now), *self._rollout.adapters), now)

    def _release(self, now: float) -> list[Command]:
        """Let the nodes go that asked to and are not needed any more, or have waited long enough."""
        commands: list[Command] = []
        for member in self._members.values():
            if not member.released and self._rollout.may_go(member, now):
                member.released = True
                commands.append(member.outbox.send(AllowLeave(member.node, member.session, 0), now))
                commands += self._advance(member.copies, now)
        return commands

    def _repeat(self, now: float) -> list[Command]:
        """Send again what seems to have been lost."""
        commands: list[Command] = []
        for member in self._members.values():
            commands += member.outbox.overdue(now, self._options.retry_s)
        nodes, routers = self._behind(self._members, now), self._behind(self._routers, now)
        return [*commands, Publish(nodes, self._table, routers)] if nodes or routers else commands

    def _behind(self, parties: Mapping[str, NodeView | RouterView], now: float) -> tuple[str, ...]:
        """Name those who have not said that they route by the last table, and note that it is sent again."""
        behind = tuple(
            name
            for name, each in parties.items()
            if each.table_version < self._table.version and now - each.table_sent_s >= self._options.retry_s
        )
        for name in behind:
            parties[name].table_sent_s = now
        return behind

    def _publish(self, now: float) -> list[Command]:
        """Return a new table, if routes changed and the last one is not too recent."""
        rollout = self._rollout
        if not (rollout.dirty and self._settled) or now - self._published_s < self._options.publish_s:
            return []
        rollout.version += 1
        rollout.dirty = False
        self._published_s = now
        self._table = RoutingTable(rollout.version, MappingProxyType(dict(rollout.routes)))
        for party in (*self._members.values(), *self._routers.values()):
            party.table_sent_s = now
        return [Publish(tuple(self._members), self._table, tuple(self._routers))] if self._members else []
