"""Destinations as a machine: no two share a byte, and a region settles with the last landing that touches it."""

import ctypes
from concurrent.futures import Future

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle as Drawn
from hypothesis.stateful import RuleBasedStateMachine, consumes, invariant, multiple, rule

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


class LandingsMachine(RuleBasedStateMachine):
    """Compared with sets of bytes."""

    open_landings = Drawn("open_landings")

    def __init__(self) -> None:
        super().__init__()
        self.landings = Destinations()
        self.bytes: dict[Destination, set[int]] = {}
        self.waiting: list[tuple[Future[None], set[Destination]]] = []

    @rule(target=open_landings, spans=st.lists(SPANS, min_size=1, max_size=3))
    def begin(self, spans: list[tuple[int, int]]):  # noqa: ANN201  (a landing or none, in hypothesis' own type)
        wanted = [bytes_of(span) for span in spans]
        taken = set().union(*self.bytes.values())
        overlap = sum(map(len, wanted)) > len(set().union(*wanted)) or bool(taken & set().union(*wanted))
        regions = [ARENA.region(*span) for span in spans]
        if overlap:
            with pytest.raises(RegionBusy):
                self.landings.begin(regions)
            return multiple()
        landing = self.landings.begin(regions)
        self.bytes[landing] = set().union(*wanted)
        return landing

    @rule(landing=open_landings)
    def quarantine(self, landing: Destination) -> None:
        landing.quarantine()

    @rule(landing=consumes(open_landings))
    def end(self, landing: Destination) -> None:
        landing.end()
        del self.bytes[landing]
        for _, left in self.waiting:
            left.discard(landing)

    @rule(span=SPANS)
    def wait(self, span: tuple[int, int]) -> None:
        left = {landing for landing, mine in self.bytes.items() if mine & bytes_of(span)}
        self.waiting.append((self.landings.settled(ARENA.region(*span)), left))

    @invariant()
    def waiters_wait_for_exactly_what_they_must(self) -> None:
        assert all(settled.done() == (not left) for settled, left in self.waiting)

    @invariant()
    def counts_agree(self) -> None:
        quarantined = sum(landing.quarantined for landing in self.bytes)
        assert self.landings.count() == (len(self.bytes), quarantined)
        assert self.landings.all_settled().done() == (not self.bytes)


LandingsMachine.TestCase.settings = settings(deadline=None, max_examples=examples(100))
TestLandings = LandingsMachine.TestCase
