"""Turn what members know of the cluster into changes against what they were told before, and back.

One encoder serves all members: a change is encoded once, and whoever comes later is told the whole first.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeVar

import msgspec

from engine.catalogue.base import CatalogueEntry
from engine.cluster.control.control_messages import (
    ViewChange,
)
from engine.cluster.control.control_values import (
    ControlFault,
    EntryChange,
    RouteChange,
    WireAdapter,
    WireMember,
    companions_of,
)
from engine.cluster.view import Member
from lora.adapter import AdapterRef
from lora.format.companions import write_companions
from scheduler.cluster.state import EMPTY_TABLE, RoutingTable, Share, Shares

_PART_BYTES = 1 << 20  # roughly, of one message
_LEAST_ITEM_BYTES = 64
K = TypeVar("K")
V = TypeVar("V")
_Item = WireMember | EntryChange | RouteChange | tuple[int, WireAdapter]


@dataclass(frozen=True, slots=True)
class SharedView:
    """What all members are told. A coordinator that has just begun is not `settled`: it may not know all there is."""

    members: Mapping[str, Member] = field(default_factory=dict[str, Member])
    catalogue: Mapping[str, CatalogueEntry] = field(default_factory=dict[str, CatalogueEntry])
    table: RoutingTable = EMPTY_TABLE
    settled: bool = True
    replacements: int = 0
    nodes_wanted: int = 0  # 0: nobody asks
    routers: tuple[str, ...] = ()


class ViewEncoder:
    """The coordinator's end of all streams."""

    def __init__(self) -> None:
        self._known = SharedView()
        self._numbers: dict[AdapterRef, int] = {}
        self._last = 0

    def advance(self, view: SharedView) -> list[ViewChange]:
        """Return what those who know the last view are to be told, in parts; nothing if it is the same."""
        before, self._known = self._known, view
        same = view.catalogue is before.catalogue and view.table is before.table
        rest_before = _rest(before)
        if same and view.members == before.members and _rest(view) == rest_before:
            return []
        fresh, gone, routes_gone = self._changed_adapters(before, view)
        rest = msgspec.structs.replace(
            _rest(view),
            members_gone=_gone(before.members, view.members),
            entries_gone=_gone(before.catalogue, view.catalogue),
            adapters_gone=gone,
            routes_gone=routes_gone,
            routers=None if view.routers == before.routers else view.routers,
        )
        items = (*fresh, *self._items(before, view))
        if not items and _rest(view) == rest_before:
            return []
        return list(_parts(items, rest))

    def whole(self) -> list[ViewChange]:
        """Return what somebody is to be told who knows nothing, in parts."""
        adapters = ((number, WireAdapter.of(ref)) for ref, number in self._numbers.items())
        items = (*adapters, *self._items(SharedView(), self._known))
        return list(_parts(items, _rest(self._known, whole=True)))

    def _changed_adapters(
        self, before: SharedView, view: SharedView
    ) -> tuple[list[tuple[int, WireAdapter]], tuple[int, ...], tuple[int, ...]]:
        """Return what is numbered anew, the numbers that are free again, and those whose routes are gone."""
        if view.catalogue is before.catalogue and view.table is before.table:
            return [], (), ()
        fresh, gone = self._renumber(view)
        lost = _gone(before.table.shares, view.table.shares)
        return fresh, gone, tuple(self._numbers[ref] for ref in lost if ref in self._numbers)

    def _renumber(self, view: SharedView) -> tuple[list[tuple[int, WireAdapter]], tuple[int, ...]]:
        """Number what is new, and return it with the numbers that are free again, which are not given twice."""
        used = dict.fromkeys(entry.ref for entry in view.catalogue.values())
        used.update(dict.fromkeys(view.table.shares))
        gone = [ref for ref in self._numbers if ref not in used]
        free = tuple(self._numbers.pop(ref) for ref in gone)
        fresh: list[tuple[int, WireAdapter]] = []
        for ref in used:
            if ref not in self._numbers:
                self._last += 1
                self._numbers[ref] = self._last
                fresh.append((self._last, WireAdapter.of(ref)))
        return fresh, free

    def _items(self, before: SharedView, view: SharedView) -> Iterator[_Item]:
        for name, member in _changed(before.members, view.members):
            yield WireMember(name, member.session, member.address, member.peer_address or "", member.zone)
        for name, entry in _changed(before.catalogue, view.catalogue):
            told = write_companions(entry.companions)
            asked = (entry.pinned, entry.alias_of, entry.max_requests, entry.targets)
            yield EntryChange(name, self._numbers[entry.ref], entry.root, told, entry.effect, *asked)
        for ref, shares in _changed(before.table.shares, view.table.shares):
            yield RouteChange(self._numbers[ref], tuple((each.node, each.part) for each in shares))


def _rest(view: SharedView, whole: bool = False) -> ViewChange:
    """Return what a view says beside members, catalogue and routes."""
    return ViewChange(
        whole,
        True,
        view.settled,
        view.table.version,
        replacements=view.replacements,
        nodes_wanted=view.nodes_wanted,
        routers=view.routers,
    )


def _gone(before: Mapping[K, V], now: Mapping[K, V]) -> tuple[K, ...]:
    return () if before is now else tuple(key for key in before if key not in now)


def _changed(before: Mapping[K, V], now: Mapping[K, V]) -> Iterator[tuple[K, V]]:
    """Return what is not as it was; nothing is looked at where nothing has changed."""
    if before is now:
        return iter(())
    return ((key, value) for key, value in now.items() if before.get(key) != value)


class ViewDecoder:
    """A member's end of one stream."""

    def __init__(self) -> None:
        self._refs: dict[int, AdapterRef] = {}
        self._members: dict[str, Member] = {}
        self._catalogue: dict[str, CatalogueEntry] = {}
        self._shares: dict[AdapterRef, Shares] = {}
        self._routers: tuple[str, ...] = ()
        self._begun = False
        self._stale = set[str]()  # of its fields
        self._shown = SharedView()  # what was returned last: mappings that have not changed are in it still

    def apply(self, change: ViewChange) -> SharedView | None:
        """Take in one part; return the view when all parts of a change have come. Raises ControlFault."""
        if change.whole:
            self._refs, self._members, self._catalogue, self._shares = {}, {}, {}, {}
        elif not self._begun:
            raise ControlFault("the first view is not whole")
        self._begun = True
        self._refs.update((number, adapter.ref()) for number, adapter in change.adapters)
        self._forget(change)
        for each in change.members:
            peer = each.peer_address or None
            self._members[each.name] = Member(each.name, each.session, each.address, peer, each.zone)
        for entry in change.entries:
            self._catalogue[entry.name] = self._entry(entry)
        for route in change.routes:
            shares = tuple(Share(node, part) for node, part in route.shares)
            self._shares[self._ref(route.adapter)] = shares
        self._routers = self._routers if change.routers is None else change.routers
        self._note(change)
        return self._show(change) if change.last else None

    def _note(self, change: ViewChange) -> None:
        """Note what has to be shown anew."""
        if change.whole or change.members or change.members_gone:
            self._stale.add("members")
        if change.whole or change.entries or change.entries_gone:
            self._stale.add("catalogue")
        if change.whole or change.routes or change.routes_gone or change.adapters_gone:
            self._stale.add("shares")

    def _show(self, change: ViewChange) -> SharedView:
        before, stale = self._shown, self._stale
        shares = MappingProxyType(dict(self._shares)) if "shares" in stale else before.table.shares
        table = before.table
        if "shares" in stale or table.version != change.table_version:
            table = RoutingTable(change.table_version, shares)
        self._shown = SharedView(
            dict(self._members) if "members" in stale else before.members,
            dict(self._catalogue) if "catalogue" in stale else before.catalogue,
            table,
            change.settled,
            change.replacements,
            change.nodes_wanted,
            self._routers,
        )
        self._stale = set[str]()
        return self._shown

    def _forget(self, change: ViewChange) -> None:
        for name in change.members_gone:
            self._members.pop(name, None)
        for name in change.entries_gone:
            self._catalogue.pop(name, None)
        for number in change.routes_gone:
            self._shares.pop(self._ref(number), None)
        for number in change.adapters_gone:
            self._shares.pop(self._ref(number), None)
            del self._refs[number]

    def _entry(self, entry: EntryChange) -> CatalogueEntry:
        companions = companions_of(entry.name, entry.companions)
        ref = self._ref(entry.adapter)
        asked = (entry.pinned, entry.alias_of, entry.max_requests, entry.targets)
        return CatalogueEntry(entry.name, ref, entry.root, companions, entry.effect, *asked)

    def _ref(self, number: int) -> AdapterRef:
        ref = self._refs.get(number)
        if ref is None:
            raise ControlFault(f"adapter {number} was never named")
        return ref


def _parts(items: Iterable[_Item], rest: ViewChange) -> Iterator[ViewChange]:
    """Cut a change into messages of bounded size; adapters come before what names them, `rest` with the last."""
    part: list[_Item] = []
    weight, whole = 0, rest.whole
    for item in items:
        if weight > _PART_BYTES:
            yield _part(part, ViewChange(whole, False, rest.settled, rest.table_version))
            part, weight, whole = [], 0, False
        part.append(item)
        weight += _weight(item)
    yield _part(part, msgspec.structs.replace(rest, whole=whole))


def _part(items: Iterable[_Item], frame: ViewChange) -> ViewChange:
    kinds = list(items)
    return ViewChange(
        frame.whole,
        frame.last,
        frame.settled,
        frame.table_version,
        adapters=tuple(each for each in kinds if isinstance(each, tuple)),
        members=tuple(each for each in kinds if isinstance(each, WireMember)),
        entries=tuple(each for each in kinds if isinstance(each, EntryChange)),
        routes=tuple(each for each in kinds if isinstance(each, RouteChange)),
        members_gone=frame.members_gone,
        entries_gone=frame.entries_gone,
        adapters_gone=frame.adapters_gone,
        routes_gone=frame.routes_gone,
        replacements=frame.replacements,
        nodes_wanted=frame.nodes_wanted,
        routers=frame.routers,
    )


def _weight(item: _Item) -> int:
    if isinstance(item, EntryChange):
        return _LEAST_ITEM_BYTES + 4 * (len(item.companions) + len(item.root) + len(item.name))
    if isinstance(item, RouteChange):
        return _LEAST_ITEM_BYTES * (1 + len(item.shares))
    return 4 * _LEAST_ITEM_BYTES
