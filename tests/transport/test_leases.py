"""The lease table as a machine: pages are free exactly when their name is withdrawn and no lease of it is open."""

import ctypes
from concurrent.futures import Future

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle as Drawn
from hypothesis.stateful import MultipleResults, RuleBasedStateMachine, consumes, invariant, multiple, rule

from tests.chance import examples
from transport.base import Arena, Memory
from transport.errors import NotOffered, RegionRefused
from transport.memory.leases import Ending, LeaseTable
from transport.memory.local_memory import LocalMemory

MEMORY = ctypes.create_string_buffer(64)
ARENA = LocalMemory("test").register(Memory(ctypes.addressof(MEMORY), 64, owner=MEMORY))
NAMES = st.sampled_from(["a", "b", "c"])


def arena() -> Arena:
    return ARENA


class LeaseTableMachine(RuleBasedStateMachine):
    """Compared with a model that keeps, per publication, its open tickets."""

    tickets = Drawn("tickets")

    def __init__(self) -> None:
        super().__init__()
        self.table = LeaseTable()
        self.published: dict[str, set[int]] = {}
        self.withdrawn: list[tuple[Future[None], set[int]]] = []
        self.ended = dict.fromkeys(Ending, 0)

    @rule(name=NAMES)
    def publish(self, name: str) -> None:
        if name in self.published:
            with pytest.raises(RegionRefused):
                self.table.publish(name, [arena().region(0, 1)])
        else:
            self.table.publish(name, [arena().region(0, 1)])
            self.published[name] = set()

    @rule(name=NAMES)
    def withdraw(self, name: str) -> None:
        if name in self.published:
            self.withdrawn.append((self.table.withdraw(name), self.published.pop(name)))
        else:
            with pytest.raises(NotOffered):
                self.table.withdraw(name)

    @rule(target=tickets, name=NAMES)
    def open(self, name: str) -> MultipleResults[int]:
        if name not in self.published:
            with pytest.raises(NotOffered):
                self.table.open(name)
            return multiple()
        ticket, _ = self.table.open(name)
        self.published[name].add(ticket)
        return multiple(ticket)

    @rule(ticket=consumes(tickets), ending=st.sampled_from(Ending))
    def end(self, ticket: int, ending: Ending) -> None:
        self.table.end(ticket, ending)
        self.ended[ending] += 1
        for open_tickets in [*self.published.values(), *(left for _, left in self.withdrawn)]:
            open_tickets.discard(ticket)

    @invariant()
    def pages_are_free_exactly_when_nobody_reads(self) -> None:
        assert all(drained.done() == (not left) for drained, left in self.withdrawn)

    @invariant()
    def counts_agree(self) -> None:
        open_tickets = [*self.published.values(), *(left for _, left in self.withdrawn)]
        assert self.table.leases() == sum(map(len, open_tickets))
        assert self.table.names() == len(self.published)
        assert self.table.endings() == {ending.value: count for ending, count in self.ended.items()}

    @invariant()
    def published_pages_are_known(self) -> None:
        held = bool(self.published) or any(left for _, left in self.withdrawn)
        assert self.table.holds(arena().region(0, 64)) == held
        assert not self.table.holds(arena().region(1, 63))


LeaseTableMachine.TestCase.settings = settings(deadline=None, max_examples=examples(100))
TestLeaseTable = LeaseTableMachine.TestCase


def test_whoever_waits_for_pages_may_use_the_table_at_once() -> None:
    table = LeaseTable()
    table.publish("a", [arena().region(0, 8)])
    ticket, _ = table.open("a")
    table.withdraw("a").add_done_callback(lambda _: table.publish("a", [arena().region(8, 8)]))
    table.end(ticket, Ending.READ)
    assert table.names() == 1


def test_a_name_needs_regions() -> None:
    with pytest.raises(RegionRefused, match="at least one"):
        LeaseTable().publish("empty", [])
