"""Make the placement that is to be, and remember how often and why it came to differ from the one before."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from lora.adapter import AdapterRef
from scheduler.cluster.coordinator.demand import DemandSource
from scheduler.cluster.coordinator.node_view import NodeView
from scheduler.cluster.coordinator.replan import Reason, Replanner
from scheduler.cluster.coordinator.rollout import Rollout
from scheduler.cluster.placement.base import Problem, fetched_bytes
from scheduler.cluster.placement.pins import with_pins
from scheduler.cluster.state import Placement, Shares

_REMEMBERED = 16
_MOST_MOVES = 8


@dataclass(frozen=True, slots=True)
class Move:
    """The nodes that were given an adapter anew, and those that were relieved of it; none if only shares changed."""

    adapter: AdapterRef
    gained: tuple[str, ...]
    lost: tuple[str, ...]

    @classmethod
    def between(cls, adapter: AdapterRef, before: Shares, after: Shares) -> "Move":
        """Compare an adapter's shares before and after."""
        had, has = ({share.node: None for share in shares} for shares in (before, after))
        gained, lost = (tuple(n for n in a if n not in b) for a, b in ((has, had), (had, has)))
        return cls(adapter, gained, lost)


@dataclass(frozen=True, slots=True)
class Replacement:
    """One time that the placement was changed: when, how many adapters' shares, and the bytes to be fetched.

    `reasons` are what happened since the plan before. `moves` are those of the adapters that are asked for most.
    """

    at_s: float
    adapters: int
    nbytes: int
    reasons: tuple[Reason, ...] = ()
    moves: tuple[Move, ...] = ()


class PlacementPlans:
    """What the coordinator plans by. `members` and `rollout` belong to the caller."""

    def __init__(
        self, planner: Replanner, demand: DemandSource, members: Mapping[str, NodeView], rollout: Rollout
    ) -> None:
        self._planner, self._demand = planner, demand
        self._members, self._rollout = members, rollout
        self._pins: dict[AdapterRef, int] = {}
        self._recorded: dict[AdapterRef, Shares] = {}  # the placement after the last plan
        self.count = 0  # of all replacements
        self.last: deque[Replacement] = deque(maxlen=_REMEMBERED)

    def pin(self, adapter: AdapterRef, copies: int) -> None:
        """Keep at least so many copies of an adapter, 0 meaning as many as is thought best."""
        if copies == self._pins.get(adapter, 0):
            return
        self._pins.pop(adapter, None)
        if copies:
            self._pins[adapter] = copies
        self._planner.hurry("pin")

    def make(self, now: float) -> list[AdapterRef]:
        """Let the rollout go to another placement if that is worth it; return the adapters that move.

        What is waited for most comes first.
        """
        problem = self.problem(now)
        if not problem.nodes or not problem.demand.tokens_per_s:
            return []
        proposed = self._planner.plan(problem, now) or problem.previous
        unable = {ref: self._unable(ref) for ref in self._pins}
        placement = with_pins(problem, proposed, self._pins, unable)
        self._rollout.load = self._planner.load(problem, placement)
        homeless = self._leave_out(problem, placement)
        target = self._rollout.target
        moved = [ref for ref, shares in placement.shares.items() if shares != target.get(ref)]
        moved.sort(key=lambda ref: -problem.demand.tokens_per_s[ref])
        target.update((ref, placement.shares[ref]) for ref in moved)
        self._record(problem, now)
        return [*moved, *(ref for ref in homeless if ref not in placement.shares)]

    def _record(self, problem: Problem, now: float) -> None:
        """Remember how the placement differs from that of the plan before.

        What lost its only home has been given another at once, so this is more than what the plan itself has moved.
        """
        before, self._recorded = self._recorded, dict(self._rollout.target)
        changed = {ref: shares for ref, shares in self._recorded.items() if shares != before.get(ref)}
        if not changed:
            return
        reasons = self._planner.reasons
        if self.count and any(ref not in before for ref in changed):
            reasons = (*reasons, "adapter_added")
        busiest = sorted(changed, key=lambda ref: -problem.demand.tokens_per_s.get(ref, 0.0))[:_MOST_MOVES]
        moves = tuple(Move.between(ref, before.get(ref, ()), changed[ref]) for ref in busiest)
        nbytes = fetched_bytes(problem, Placement(MappingProxyType(changed)))
        self.count += 1
        self.last.append(Replacement(now, len(changed), nbytes, reasons, moves))

    def _unable(self, adapter: AdapterRef) -> set[str]:
        return {member.node for member in self._members.values() if adapter in member.failed}

    def _leave_out(self, problem: Problem, placement: Placement) -> list[AdapterRef]:
        """Say which adapters may give way to pinned ones; return those that need a home, since none is pinned now."""
        rollout = self._rollout
        rollout.pinned = frozenset(self._pins)
        before, rollout.unplaced = rollout.unplaced, frozenset[AdapterRef]()
        if self._pins:
            rollout.unplaced = frozenset(
                ref for ref in problem.demand.tokens_per_s if ref not in placement.shares
            )
        return [ref for ref in problem.demand.tokens_per_s if ref in before and ref not in rollout.unplaced]

    def problem(self, now: float) -> Problem:
        """Return what is to be placed now, on the nodes that stay if there are any."""
        members = [member for member in self._members.values() if not member.released]
        members = [member for member in members if not member.leaving] or members
        states = tuple(member.state(self._planner.options.headroom) for member in members)
        previous = Placement(MappingProxyType(dict(self._rollout.target)))
        return Problem(self._demand.project(now), states, previous)
