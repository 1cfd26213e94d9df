"""Turn reports into changes against the last one of the same stream, and back.

A stream loses nothing and keeps the order, so each end keeps what the other knows. A new stream begins with a whole
report. Adapters travel once each, and by number after that.
"""

from collections.abc import Iterable, Mapping

from engine.cluster.control.control_messages import (
    ReportChange,
    RouterReportChange,
)
from engine.cluster.control.control_values import (
    ControlFault,
    RefsChange,
    WireAdapter,
    WireHardware,
)
from lora.adapter import BASE, AdapterRef
from scheduler.cluster.protocol.messages import NodeHardware, Report, RouterReport

MOST_ADAPTERS = 1 << 16
"""Numbered on one stream before its numbers begin anew: contents come and go for as long as a node runs."""

_Refs = tuple[AdapterRef, ...]


class AdapterNumbers:
    """The adapters that a stream has named, in order. The sender and the receiver have one each."""

    def __init__(self) -> None:
        self._refs: list[AdapterRef] = []
        self._numbers: dict[AdapterRef, int] = {}
        self._fresh: list[WireAdapter] = []

    @property
    def is_full(self) -> bool:
        """Tell whether the numbers should begin anew."""
        return len(self._refs) >= MOST_ADAPTERS

    def number(self, ref: AdapterRef) -> int:
        """Return the adapter's number; one that is named for the first time is among the next `take_fresh`."""
        number = self._numbers.get(ref)
        if number is None:
            self._fresh.append(WireAdapter.of(ref))
            number = self._add(ref)
        return number

    def take_fresh(self) -> tuple[WireAdapter, ...]:
        """Return the adapters numbered since this was last asked."""
        fresh, self._fresh = tuple(self._fresh), []
        return fresh

    def learn(self, adapters: Iterable[WireAdapter]) -> None:
        """Number adapters as the sender did. Raises ControlFault for more than a sender numbers."""
        for adapter in adapters:
            if len(self._refs) >= 2 * MOST_ADAPTERS:
                raise ControlFault(f"more than {2 * MOST_ADAPTERS} adapters in one stream")
            self._add(adapter.ref())

    def ref(self, number: int) -> AdapterRef:
        """Return the adapter of a number. Raises ControlFault."""
        if number >= len(self._refs):
            raise ControlFault(f"adapter {number} was never named")
        return self._refs[number]

    def _add(self, ref: AdapterRef) -> int:
        number = self._numbers[ref] = len(self._refs)
        self._refs.append(ref)
        return number


class _ListMirror:
    """A list of refs that both ends know."""

    def __init__(self) -> None:
        self._known: _Refs = ()

    def change_to(self, refs: _Refs, numbers: AdapterNumbers) -> RefsChange:
        """Return how the list becomes `refs`, in the same order."""
        before, self._known = self._known, refs
        if before == refs:
            return RefsChange()
        wanted, had = frozenset(refs), frozenset(before)
        come = tuple(ref for ref in refs if ref not in had)
        if (*(ref for ref in before if ref in wanted), *come) != refs:
            return RefsChange(True, (), tuple(map(numbers.number, refs)))
        gone = tuple(numbers.number(ref) for ref in before if ref not in wanted)
        return RefsChange(False, gone, tuple(map(numbers.number, come)))

    def apply(self, change: RefsChange, numbers: AdapterNumbers) -> _Refs:
        """Return the list after `change`. Raises ControlFault."""
        gone = {numbers.ref(number) for number in change.gone}
        kept = () if change.whole else (ref for ref in self._known if ref not in gone)
        self._known = (*kept, *map(numbers.ref, change.come))
        if len(self._known) > 2 * MOST_ADAPTERS:
            raise ControlFault(f"a list of {len(self._known)} adapters")
        return self._known


class _Lists:
    """What both ends know of the reports of one stream."""

    def __init__(self) -> None:
        self.numbers = AdapterNumbers()
        self.held, self.loading, self.cached = _ListMirror(), _ListMirror(), _ListMirror()
        self.machine: NodeHardware | None = None


class ReportEncoder:
    """The node's end of one stream."""

    def __init__(self) -> None:
        self._lists: _Lists | None = None

    def encode(self, report: Report) -> ReportChange:
        """Return the report as a change against the one before."""
        whole = self._lists is None or self._lists.numbers.is_full
        lists = _Lists() if self._lists is None or whole else self._lists
        self._lists = lists
        numbers = lists.numbers
        held = lists.held.change_to(report.held, numbers)
        loading = lists.loading.change_to(report.loading, numbers)
        cached = lists.cached.change_to(report.cached, numbers)
        taken = tuple((numbers.number(ref), tokens) for ref, tokens in report.taken if not ref.is_base)
        machine = None if lists.machine == report.machine else WireHardware.of(report.machine)
        lists.machine = report.machine
        return ReportChange(
            whole=whole,
            adapters=numbers.take_fresh(),
            session=report.session,
            number=report.number,
            applied=report.applied,
            table_version=report.table_version,
            held=held,
            loading=loading,
            cached=cached,
            taken=taken,
            slowdown=report.slowdown,
            machine=machine,
            base_taken=sum(tokens for ref, tokens in report.taken if ref.is_base),
        )


class ReportDecoder:
    """The coordinator's end of the stream of one node."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._lists: _Lists | None = None

    def decode(self, change: ReportChange) -> Report:
        """Return the report. Raises ControlFault."""
        lists = _Lists() if change.whole else self._lists
        if lists is None:
            raise ControlFault("the first report is not whole")
        self._lists = lists
        lists.numbers.learn(change.adapters)
        if change.machine is not None:
            lists.machine = change.machine.machine()
        if lists.machine is None:
            raise ControlFault("the first report names no machine")
        numbers = lists.numbers
        taken = tuple((numbers.ref(number), tokens) for number, tokens in change.taken)
        return Report(
            node=self._node,
            session=change.session,
            number=change.number,
            machine=lists.machine,
            applied=change.applied,
            table_version=change.table_version,
            held=lists.held.apply(change.held, numbers),
            loading=lists.loading.apply(change.loading, numbers),
            cached=lists.cached.apply(change.cached, numbers),
            taken=(*taken, *_of_base(change.base_taken)),
            slowdown=change.slowdown,
        )


class _Totals:
    """What both ends know of a router's totals."""

    def __init__(self) -> None:
        self.numbers = AdapterNumbers()
        self.refused: dict[AdapterRef, int] = {}

    def changed(self, totals: Mapping[AdapterRef, int]) -> tuple[tuple[AdapterRef, int], ...]:
        """Take over totals; return those that are not as before."""
        changed = tuple((ref, total) for ref, total in totals.items() if self.refused.get(ref) != total)
        self.refused.update(changed)
        return changed


class RouterReportEncoder:
    """The router's end of one stream."""

    def __init__(self) -> None:
        self._totals: _Totals | None = None

    def encode(self, report: RouterReport) -> RouterReportChange:
        """Return the report as a change against the one before."""
        refused = {ref: total for ref, total in report.refused if not ref.is_base}
        totals = self._totals
        whole = totals is None or totals.numbers.is_full or not refused.keys() >= totals.refused.keys()
        totals = self._totals = _Totals() if totals is None or whole else totals
        changed = tuple((totals.numbers.number(ref), total) for ref, total in totals.changed(refused))
        fresh = totals.numbers.take_fresh()
        base = sum(total for ref, total in report.refused if ref.is_base)
        return RouterReportChange(whole, fresh, report.session, report.table_version, changed, base)


class RouterReportDecoder:
    """The coordinator's end of the stream of one router."""

    def __init__(self, router: str) -> None:
        self._router = router
        self._totals: _Totals | None = None

    def decode(self, change: RouterReportChange) -> RouterReport:
        """Return the report, with all totals. Raises ControlFault."""
        totals = _Totals() if change.whole else self._totals
        if totals is None:
            raise ControlFault("the first report is not whole")
        self._totals = totals
        totals.numbers.learn(change.adapters)
        totals.refused.update((totals.numbers.ref(number), total) for number, total in change.refused)
        refused = (*totals.refused.items(), *_of_base(change.base_refused))
        return RouterReport(self._router, change.table_version, change.session, refused)


def _of_base(tokens: int) -> tuple[tuple[AdapterRef, int], ...]:
    """Return the base model's tokens as those of an adapter, if there are any."""
    return ((BASE, tokens),) if tokens else ()
