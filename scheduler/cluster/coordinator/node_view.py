"""What the coordinator believes of each node, and of each adapter's copies. Beliefs follow reports, and a
report is believed about an adapter only if the node had obeyed the last command about it (see `delivery`)."""

from enum import Enum

from lora.adapter import AdapterRef
from scheduler.cluster.protocol.delivery import Outbox
from scheduler.cluster.protocol.messages import Drop, Numbered, Pull, Report, RouterReport
from scheduler.cluster.state import NodeState

FAILED_S = 30.0
"""For which a node that could not get an adapter is not asked to again."""
_SLOWDOWN_STEP = 1.25  # a node's slowdown is taken to have changed when it did by this factor


class Copy(Enum):
    """One adapter's bytes on one node: on their way, there to stay, or told to go."""

    PULLING = "pulling"
    HELD = "held"
    DROPPING = "dropping"


class RouterView:
    """One session of one router: when it last spoke, by which table it routes, and when it was last sent one."""

    def __init__(self, session: int) -> None:
        self.session = session
        self.seen_s = self.table_sent_s = float("-inf")
        self.table_version = 0
        self._refused: dict[AdapterRef, int] = {}

    def absorb(self, report: RouterReport, now: float) -> list[tuple[AdapterRef, int]]:
        """Take over a report; return the tokens refused beyond the totals already known, by adapter."""
        self.seen_s, self.table_version = now, report.table_version
        grown = [(ref, total - self._refused.get(ref, 0)) for ref, total in report.refused]
        self._refused.update(report.refused)
        return [(ref, tokens) for ref, tokens in grown if tokens > 0]


class NodeView:
    """One live session of one node."""

    def __init__(self, report: Report, now: float) -> None:
        self.node, self.session, self.machine = report.node, report.session, report.machine
        self.outbox = Outbox()
        self.copies: dict[AdapterRef, Copy] = {}
        self.waiting: dict[AdapterRef, None] = {}  # to be pulled when there is room
        self.failed: dict[AdapterRef, float] = {}  # what it could not get, and until when it is not asked to
        self.leave_by_s: float | None = None  # when it goes in any case, once it has asked to
        self.released = False
        self.slowdown = 1.0
        self.seen_s = now
        self.table_version, self.table_sent_s = 0, float("-inf")
        self.used_bytes = 0
        self._number = 0
        self._ordered: dict[AdapterRef, int] = {}  # the last command about an adapter
        self._cached: tuple[AdapterRef, ...] = ()
        self._taken: dict[AdapterRef, int] = {}

    @property
    def leaving(self) -> bool:
        """Return whether the node has asked to go."""
        return self.leave_by_s is not None

    @property
    def pulling(self) -> int:
        """Count the pulls that have not ended."""
        return sum(copy is Copy.PULLING for copy in self.copies.values())

    def fits(self, adapter: AdapterRef, spare: float = 0.0) -> bool:
        """Return whether there is memory for one more adapter, with the part `spare` left.

        All that is here, coming or still going takes memory.
        """
        return self.used_bytes + adapter.nbytes <= self.machine.memory_bytes * (1 - spare)

    def state(self, headroom: float) -> NodeState:
        """Return the node as a planner sees it; `headroom` is the part of its memory that plans leave free."""
        kept = (ref for ref, copy in self.copies.items() if copy is not Copy.DROPPING)
        return NodeState(
            node=self.node,
            memory_bytes=int(self.machine.memory_bytes * (1 - headroom)),
            operating_points=self.machine.operating_points,
            slowdown=self.slowdown,
            zone=self.machine.zone,
            held=tuple(dict.fromkeys((*kept, *self._cached))),
        )

    def order(self, command: Pull | Drop, now: float) -> Numbered:
        """Number `command`, remember it, and believe it under way."""
        numbered = self.outbox.send(command, now)
        self._ordered[command.adapter] = numbered.number
        self._set(command.adapter, Copy.PULLING if isinstance(command, Pull) else Copy.DROPPING)
        self.waiting.pop(command.adapter, None)
        return numbered

    def is_news(self, report: Report) -> bool:
        """Return whether a report comes for the first time, and not after a later one."""
        return report.number > self._number

    def absorb(self, report: Report, now: float) -> list[AdapterRef]:
        """Take over a report that is news; returns the adapters whose copies here changed.

        A copy that was ordered and that is neither here nor coming could not be had.
        """
        self._number, self.seen_s, self.machine = report.number, now, report.machine
        self.table_version, self._cached = report.table_version, report.cached
        self.outbox.applied(report.applied)
        held, loading = dict.fromkeys(report.held), dict.fromkeys(report.loading)
        changed: list[AdapterRef] = []
        for ref in dict.fromkeys((*self.copies, *held, *loading)):
            if self._ordered.get(ref, 0) > report.applied:
                continue
            before = self.copies.get(ref)
            after = Copy.HELD if ref in held else Copy.PULLING if ref in loading else None
            if before is Copy.DROPPING and after is not None:
                continue
            if after is not before:
                if after is None and before is not Copy.DROPPING:
                    self.failed[ref] = now + FAILED_S
                self._set(ref, after)
                changed.append(ref)
        return changed

    def take_able(self, now: float) -> list[AdapterRef]:
        """Return the adapters that the node may be asked to get again from now on."""
        able = [ref for ref, until_s in self.failed.items() if until_s <= now]
        for ref in able:
            del self.failed[ref]
        return able

    def update_slowdown(self, slowdown: float) -> bool:
        """Take over the node's slowdown if it differs much from what was believed; True if it does."""
        slowdown = max(slowdown, 0.1)
        apart = max(slowdown / self.slowdown, self.slowdown / slowdown) >= _SLOWDOWN_STEP
        self.slowdown = slowdown if apart else self.slowdown
        return apart

    def newly_taken(self, report: Report) -> list[tuple[AdapterRef, int]]:
        """Return tokens by adapter beyond the totals already known of this session."""
        grown = [(ref, total - self._taken.get(ref, 0)) for ref, total in report.taken]
        grown = [(ref, tokens) for ref, tokens in grown if tokens > 0]
        for ref, tokens in grown:
            self._taken[ref] = self._taken.get(ref, 0) + tokens
        return grown

    def _set(self, adapter: AdapterRef, copy: Copy | None) -> None:
        had = adapter in self.copies
        if copy is None:
            self.copies.pop(adapter, None)
            self._ordered.pop(adapter, None)
        else:
            self.copies[adapter] = copy
        self.used_bytes += adapter.nbytes * ((copy is not None) - had)
