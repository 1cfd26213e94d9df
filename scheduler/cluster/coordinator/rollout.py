"""Get from the current placement to the next, adapter by adapter: pulls, routes, drops.

Add before remove: bytes are pulled to where they should be, and requests follow when they have arrived. A copy
that nothing is routed to is dropped when every router routes by a table that says so. The last one never is.
Each call costs in proportion to one adapter's copies, or one node's, not to the cluster.
"""

from collections.abc import Iterable, Mapping

from lora.adapter import AdapterRef
from scheduler.cluster.coordinator.interim import evenly, interim_shares, shares_on
from scheduler.cluster.coordinator.node_view import Copy, NodeView, RouterView
from scheduler.cluster.protocol.messages import Command, Drop, Pull
from scheduler.cluster.state import Shares, normalised

_MAX_SOURCES = 3


class Rollout:
    """Where adapters should be (`target`) and where requests go now (`routes`).

    `version` counts the routing tables; `dirty` says that `routes` differ from the last of them. `members`
    and `routers` belong to the caller.
    """

    def __init__(
        self,
        members: Mapping[str, NodeView],
        routers: Mapping[str, RouterView],
        max_pulls: int,
        headroom: float = 0.0,
    ) -> None:
        self.adapters: dict[AdapterRef, None] = {}
        self.target: dict[AdapterRef, Shares] = {}
        self.routes: dict[AdapterRef, Shares] = {}
        self.load: dict[str, float] = {}  # planned utilisation by node
        self.pinned = frozenset[AdapterRef]()
        self.unplaced = frozenset[
            AdapterRef
        ]()  # what the last plan had no room for: it gives way to what is pinned
        self.version = 0
        self.dirty = False
        self.moved_s = 0.0  # when a copy last changed or was ordered to
        self._members, self._routers = members, routers
        self._max_pulls, self._headroom = max_pulls, headroom
        self._deleted: dict[AdapterRef, None] = {}
        self._holders: dict[AdapterRef, dict[str, None]] = {}
        self._surplus: dict[
            tuple[AdapterRef, str], int
        ] = {}  # and the table version that stopped routing to it

    def register(self, adapter: AdapterRef) -> None:
        """Serve `adapter` from now on."""
        self.adapters[adapter] = None
        self._deleted.pop(adapter, None)

    def delete(self, adapter: AdapterRef) -> None:
        """Serve and hold `adapter` no more."""
        self.adapters.pop(adapter, None)
        self._deleted[adapter] = None

    def changed(self, member: NodeView, adapters: Iterable[AdapterRef], now: float) -> None:
        """Note that copies of `adapters` on `member` came or went."""
        for ref in adapters:
            holders = self._holders.setdefault(ref, {})
            if ref in member.copies and member.node in self._members:
                holders[member.node] = None
            else:
                holders.pop(member.node, None)
            if not holders:
                del self._holders[ref]
            self.moved_s = now

    def advance(self, adapter: AdapterRef, now: float) -> list[Command]:
        """Do all that can be done for one adapter now, and route it by what is there."""
        if adapter not in self.adapters:
            return self._withdraw(adapter, now)
        target = self._serving(self.target.get(adapter, ()))
        target = self._able(adapter, target) or self._interim_home(adapter)
        if not target:
            self._route(adapter, ())
            return []
        self.target[adapter] = target
        commands = [
            pull for share in target for pull in self._ensure(adapter, self._members[share.node], now)
        ]
        self._route(adapter, interim_shares(target, self.routes.get(adapter, ()), self._copies(adapter)))
        self._trim(adapter)
        return commands

    def fill(self, member: NodeView, now: float) -> list[Command]:
        """Pull what waits for room on `member`."""
        commands: list[Command] = []
        for ref in list(member.waiting):
            del member.waiting[ref]
            if any(share.node == member.node for share in self.target.get(ref, ())):
                commands += self._ensure(ref, member, now)
        return commands

    def retire(self, now: float) -> list[Command]:
        """Drop the copies that no node routes to any more, but never an adapter's last."""
        known = self._known_version()
        commands: list[Command] = []
        for (ref, node), version in list(self._surplus.items()):
            if not self._is_surplus(ref, node):
                del self._surplus[ref, node]
            elif version <= known and self._is_safe_without(ref, node):
                del self._surplus[ref, node]
                commands.append(self._drop(ref, self._members[node], now))
        return commands

    def give_up_waiting(self, now: float) -> list[Command]:
        """Give up the moves that wait for memory: an adapter that is served elsewhere stays there."""
        waiting = dict.fromkeys(ref for member in self._members.values() for ref in member.waiting)
        commands: list[Command] = []
        for ref in waiting:
            ready = [node for node, copy in self._copies(ref).items() if copy is Copy.HELD]
            stays = normalised(shares_on(ready, self.routes.get(ref, ())))
            if stays and self._serving(stays) == stays:
                self.target[ref] = stays
                for member in self._members.values():
                    member.waiting.pop(ref, None)
                commands += self.advance(ref, now)
        return commands

    def may_go(self, member: NodeView, now: float) -> bool:
        """Return whether a node that asked to go may: nothing depends on it, or it has waited and others stay."""
        if member.leave_by_s is None:
            return False
        stays = any(not each.leaving for each in self._members.values())
        return (now >= member.leave_by_s and stays) or self._is_free(member)

    def _is_free(self, member: NodeView) -> bool:
        """Return whether nothing is routed to `member` by any table in use and no adapter's last copy is on
        it."""
        if self.dirty or self._known_version() < self.version:
            return False
        return all(
            ref not in self.adapters
            or (not self._routed(ref, member.node) and self._is_safe_without(ref, member.node))
            for ref in member.copies
        ) and not any(share.node == member.node for shares in self.routes.values() for share in shares)

    def _known_version(self) -> int:
        """Return the version that every node and router has seen."""
        parties = (*self._members.values(), *self._routers.values())
        return min((each.table_version for each in parties), default=0)

    def held(self, adapter: AdapterRef) -> Shares:
        """Return equal shares for the nodes that have `adapter`; empty if none does."""
        return evenly(node for node, copy in self._copies(adapter).items() if copy is Copy.HELD)

    def _copies(self, adapter: AdapterRef) -> dict[str, Copy]:
        """Return the copies that may be served from, by node."""
        members = ((node, self._members[node]) for node in self._holders.get(adapter, ()))
        found = {node: member.copies[adapter] for node, member in members if not member.released}
        return {node: copy for node, copy in found.items() if copy is not Copy.DROPPING}

    def _serving(self, shares: Shares) -> Shares:
        """Return the shares on live nodes; those on leaving ones only if there are no others."""
        alive = [
            share
            for share in shares
            if share.node in self._members and not self._members[share.node].released
        ]
        staying = [share for share in alive if not self._members[share.node].leaving]
        kept = staying or alive
        return shares if len(kept) == len(shares) else normalised((share.node, share.part) for share in kept)

    def _able(self, adapter: AdapterRef, shares: Shares) -> Shares:
        """Return the shares on nodes that have not failed to get the adapter of late; none if all have."""
        able = [share for share in shares if adapter not in self._members[share.node].failed]
        return shares if len(able) == len(shares) else normalised((each.node, each.part) for each in able)

    def _interim_home(self, adapter: AdapterRef) -> Shares:
        """Choose a home until the next plan: the nodes that have the adapter, else the least loaded with
        memory for it."""
        held = self._serving(self.held(adapter))
        if held or adapter in self.unplaced:
            return held
        members = [member for member in self._members.values() if not member.released]
        members = [member for member in members if not member.leaving] or members
        members = [member for member in members if adapter not in member.failed] or members
        roomy = [member for member in members if member.fits(adapter)] or members
        if not roomy:
            return ()
        home = min(
            roomy,
            key=lambda member: (self.load.get(member.node, 0.0), len(member.waiting), member.used_bytes),
        )
        return normalised([(home.node, 1.0)])

    def _ensure(self, adapter: AdapterRef, member: NodeView, now: float) -> list[Command]:
        """Pull `adapter` to `member` unless it is there or coming, when there is room and a pull free.

        One more copy of what is served elsewhere leaves the headroom to requests.
        """
        copy = member.copies.get(adapter)
        if copy in (Copy.HELD, Copy.PULLING) or adapter in member.failed:
            return []
        having = [node for node, copy in self._copies(adapter).items() if copy is Copy.HELD]
        fits = member.fits(adapter, self._headroom if having else 0.0)
        if copy is None and not (fits and member.pulling < self._max_pulls):
            member.waiting[adapter] = None
            return self._displace(adapter, member, now) if adapter in self.pinned and not fits else []
        sources = sorted(
            having, key=lambda node: (self._members[node].slowdown, self.load.get(node, 0.0), node)
        )
        pull = Pull(member.node, member.session, 0, adapter, tuple(sources[:_MAX_SOURCES]))
        numbered = member.order(pull, now)
        self.changed(member, (adapter,), now)
        return [numbered]

    def _displace(self, adapter: AdapterRef, member: NodeView, now: float) -> list[Command]:
        """Drop what no plan has room for until a pinned adapter fits, be it the last copy."""
        commands: list[Command] = []
        lacking = member.used_bytes + adapter.nbytes - member.machine.memory_bytes * (1 - self._headroom)
        for ref, copy in list(member.copies.items()):
            if copy is Copy.DROPPING:
                lacking -= ref.nbytes
            elif lacking > 0 and ref in self.unplaced:
                lacking -= ref.nbytes
                others = [share for share in self.target.pop(ref, ()) if share.node != member.node]
                if others:
                    self.target[ref] = normalised((share.node, share.part) for share in others)
                commands += [self._drop(ref, member, now), *self.advance(ref, now)]
        return commands

    def _drop(self, adapter: AdapterRef, member: NodeView, now: float) -> Command:
        numbered = member.order(Drop(member.node, member.session, 0, adapter), now)
        self.moved_s = now
        return numbered

    def _route(self, adapter: AdapterRef, shares: Shares) -> None:
        if shares != self.routes.get(adapter, ()):
            self.dirty = True
            self.routes[adapter] = shares
            if not shares:
                del self.routes[adapter]

    def _trim(self, adapter: AdapterRef) -> None:
        """Note the copies that are not wanted any more, also those still coming: they may have arrived by
        now."""
        for node in self._holders.get(adapter, ()):
            if self._is_surplus(adapter, node):
                self._surplus.setdefault((adapter, node), self.version + self.dirty)
            else:
                self._surplus.pop((adapter, node), None)

    def _withdraw(self, adapter: AdapterRef, now: float) -> list[Command]:
        self.target.pop(adapter, None)
        self._route(adapter, ())
        if adapter not in self._deleted:
            return []
        members = [self._members[node] for node in self._holders.get(adapter, ())]
        return [
            self._drop(adapter, each, now) for each in members if each.copies[adapter] is not Copy.DROPPING
        ]

    def _routed(self, adapter: AdapterRef, node: str) -> bool:
        return any(share.node == node for share in self.routes.get(adapter, ()))

    def _is_surplus(self, adapter: AdapterRef, node: str) -> bool:
        """Return whether a copy is neither wanted nor routed to; what a leaving node has goes with it."""
        member = self._members.get(node)
        if member is None or member.leaving or adapter not in self.adapters:
            return False
        if member.copies.get(adapter) not in (Copy.HELD, Copy.PULLING):
            return False
        wanted = any(share.node == node for share in self.target.get(adapter, ()))
        return not wanted and not self._routed(adapter, node)

    def _is_safe_without(self, adapter: AdapterRef, node: str) -> bool:
        """Return whether a node that stays has another copy."""
        others = (
            other for other, copy in self._copies(adapter).items() if copy is Copy.HELD and other != node
        )
        return any(not self._members[other].leaving for other in others)
