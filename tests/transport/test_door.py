"""Which way the bytes go: what both ends offer, in this node's order, unless a setting names one."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from transport.base import Arena, Lease, Region
from transport.control.connection import Connection, Deadline
from transport.control.messages import Message
from transport.errors import PathUnavailable
from transport.memory.destinations import Destination
from transport.paths.base import AUTO, usable
from transport.paths.ucx import Reach


@dataclass(frozen=True)
class FakeDoor:
    """Leads to peers that offer the word it knows."""

    name: str
    word: str
    cue: tuple[Message, ...] = ()

    def offer(self) -> str:
        return self.word

    def reaches(self, offer: str) -> bool:
        return offer == self.word

    def card(self) -> str:
        return ""

    def register(self, arena: Arena) -> None:
        raise AssertionError("not asked for")

    def carries(self, device: int) -> bool:
        return device == -1

    def send(self, channel: Connection, regions: Sequence[Region], deadline: Deadline) -> None:
        raise AssertionError("not asked for")

    def read(
        self, channel: Connection, lease: Lease, card: str, landing: Destination, deadline: Deadline
    ) -> tuple[Message, ...]:
        raise AssertionError("not asked for")

    def close(self) -> None:
        raise AssertionError("not asked for")


UCX, STREAM = FakeDoor("ucx", "here"), FakeDoor("stream", "")
BOTH = {"ucx": "here", "stream": ""}


@pytest.mark.parametrize(
    ("doors", "offers", "setting", "chosen"),
    [
        ([UCX, STREAM], BOTH, AUTO, UCX),
        ([UCX, STREAM], {"stream": "", "ucx": "elsewhere"}, AUTO, STREAM),
        ([UCX, STREAM], {"stream": ""}, AUTO, STREAM),
        ([STREAM], BOTH, AUTO, STREAM),
        ([UCX, STREAM], BOTH, "stream", STREAM),
        ([STREAM, UCX], BOTH, "ucx", UCX),
    ],
)
def test_the_first_door_that_leads_there_is_taken(
    doors: list[FakeDoor], offers: dict[str, str], setting: str, chosen: FakeDoor
) -> None:
    assert usable(doors, offers, setting)[0] is chosen


@pytest.mark.parametrize(
    ("doors", "offers"),
    [([STREAM], BOTH), ([UCX, STREAM], {"stream": ""}), ([UCX, STREAM], {"stream": "", "ucx": "elsewhere"})],
)
def test_a_named_door_that_does_not_lead_there_is_refused_not_replaced(
    doors: list[FakeDoor], offers: dict[str, str]
) -> None:
    with pytest.raises(PathUnavailable, match="these do: stream"):
        usable(doors, offers, "ucx")


HERE = Reach("host 1", infiniband=False, open_network=False)


@pytest.mark.parametrize(
    ("one", "other", "meet"),
    [
        (HERE, HERE, True),
        (HERE, Reach("host 2", infiniband=False, open_network=False), False),
        (HERE, Reach("host 2", infiniband=True, open_network=True), False),
        (Reach("host 1", True, False), Reach("host 2", True, False), True),
        (Reach("host 1", False, True), Reach("host 2", False, True), True),
        (Reach("host 1", False, True), Reach("host 2", True, False), False),
    ],
)
def test_ucx_reaches_the_same_host_and_what_shares_a_fabric(one: Reach, other: Reach, meet: bool) -> None:
    assert one.meets(other) is other.meets(one) is meet


def test_this_machine_meets_itself() -> None:
    assert Reach.of_this_machine(open_network=False).meets(Reach.of_this_machine(open_network=True))
    assert json.dumps(Reach.of_this_machine(open_network=False).host)
