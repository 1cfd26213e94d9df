"""Destinations as a machine: no two share a byte, and a region settles with the last destination that touches it."""

import ctypes
from concurrent.futures import Future

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle as Drawn
from hypothesis.stateful import MultipleResults, RuleBasedStateMachine, consumes, invariant, multiple, rule

from tests.chance import examples
from transport.base import Memory
from transport.errors import RegionBusy
from transport.memory.destinations import Destination, Destinations
from transport.memory.local_memory import LocalMemory

MEMORY = ctypes.create_string_buffer(32)
ARENA = LocalMemory("test").register(Memory(ctypes.addressof(MEMORY), 32, owner=MEMORY))
SPANS = st.tuples(st.integers(0, 31), st.integers(1, 8)).filter(lambda span: sum(span) <= 32)


def bytes_of(span: tuple[int, int]) -> set[int]:
    return set(range(span[0], span[0] + span[1]))


class DestinationsMachine(RuleBasedStateMachine):
    """Compared with sets of bytes."""

    open_destinations = Drawn("open_destinations")

    def __init__(self) -> None:
        super().__init__()
        self.destinations = Destinations()
        self.bytes: dict[Destination, set[int]] = {}
        self.waiting: list[tuple[Future[None], set[Destination]]] = []

    @rule(target=open_destinations, spans=st.lists(SPANS, min_size=1, max_size=3))
    def claim(self, spans: list[tuple[int, int]]) -> MultipleResults[Destination]:
        wanted = [bytes_of(span) for span in spans]
        taken = set[int]().union(*self.bytes.values())
        overlap = sum(map(len, wanted)) > len(set[int]().union(*wanted)) or bool(
            taken & set[int]().union(*wanted)
        )
        regions = [ARENA.region(*span) for span in spans]
        if overlap:
            with pytest.raises(RegionBusy):
                self.destinations.claim(regions)
            return multiple()
        destination = self.destinations.claim(regions)
        self.bytes[destination] = set[int]().union(*wanted)
        return multiple(destination)

    @rule(destination=open_destinations)
    def quarantine(self, destination: Destination) -> None:
        destination.quarantine()

    @rule(destination=consumes(open_destinations))
    def end(self, destination: Destination) -> None:
        destination.end()
        del self.bytes[destination]
        for _, left in self.waiting:
            left.discard(destination)

    @rule(span=SPANS)
    def wait(self, span: tuple[int, int]) -> None:
        left = {destination for destination, mine in self.bytes.items() if mine & bytes_of(span)}
        self.waiting.append((self.destinations.settled(ARENA.region(*span)), left))

    @invariant()
    def waiters_wait_for_exactly_what_they_must(self) -> None:
        assert all(settled.done() == (not left) for settled, left in self.waiting)

    @invariant()
    def counts_agree(self) -> None:
        quarantined = sum(destination.quarantined for destination in self.bytes)
        assert self.destinations.count() == (len(self.bytes), quarantined)
        assert self.destinations.all_settled().done() == (not self.bytes)


DestinationsMachine.TestCase.settings = settings(deadline=None, max_examples=examples(100))
TestDestinations = DestinationsMachine.TestCase
