"""Which path the bytes take: what both ends offer, in this node's order, unless a setting names one."""

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
class FakePath:
    """Leads to peers that offer the word it knows."""

    name: str
    word: str
    start_messages: tuple[Message, ...] = ()

    def capabilities(self) -> str:
        return self.word

    def reaches(self, capabilities: str) -> bool:
        return capabilities == self.word

    def metadata(self) -> str:
        return ""

    def register(self, arena: Arena) -> None:
        raise AssertionError("not asked for")

    def supports(self, device: int) -> bool:
        return device == -1

    def send(self, connection: Connection, regions: Sequence[Region], deadline: Deadline) -> None:
        raise AssertionError("not asked for")

    def read(
        self,
        connection: Connection,
        lease: Lease,
        metadata: str,
        destination: Destination,
        deadline: Deadline,
    ) -> tuple[Message, ...]:
        raise AssertionError("not asked for")

    def close(self) -> None:
        raise AssertionError("not asked for")


UCX, STREAM = FakePath("ucx", "here"), FakePath("stream", "")
BOTH = {"ucx": "here", "stream": ""}


@pytest.mark.parametrize(
    ("paths", "capabilities", "setting", "chosen"),
    [
        ([UCX, STREAM], BOTH, AUTO, UCX),
        ([UCX, STREAM], {"stream": "", "ucx": "elsewhere"}, AUTO, STREAM),
        ([UCX, STREAM], {"stream": ""}, AUTO, STREAM),
        ([STREAM], BOTH, AUTO, STREAM),
        ([UCX, STREAM], BOTH, "stream", STREAM),
        ([STREAM, UCX], BOTH, "ucx", UCX),
    ],
)
def test_the_first_path_that_leads_there_is_taken(
    paths: list[FakePath], capabilities: dict[str, str], setting: str, chosen: FakePath
) -> None:
    assert usable(paths, capabilities, setting)[0] is chosen


@pytest.mark.parametrize(
    ("paths", "capabilities"),
    [([STREAM], BOTH), ([UCX, STREAM], {"stream": ""}), ([UCX, STREAM], {"stream": "", "ucx": "elsewhere"})],
)
def test_a_named_path_that_does_not_lead_there_is_refused_not_replaced(
    paths: list[FakePath], capabilities: dict[str, str]
) -> None:
    with pytest.raises(PathUnavailable, match="these do: stream"):
        usable(paths, capabilities, "ucx")


HERE = Reach("host 1", infiniband=False, open_network=False)


@pytest.mark.parametrize(
    ("one", "other", "included"),
    [
        (HERE, HERE, True),
        (HERE, Reach("host 2", infiniband=False, open_network=False), False),
        (HERE, Reach("host 2", infiniband=True, open_network=True), False),
        (Reach("host 1", True, False), Reach("host 2", True, False), True),
        (Reach("host 1", False, True), Reach("host 2", False, True), True),
        (Reach("host 1", False, True), Reach("host 2", True, False), False),
    ],
)
def test_ucx_reaches_the_same_host_and_what_shares_a_fabric(one: Reach, other: Reach, included: bool) -> None:
    assert one.includes(other) is other.includes(one) is included


def test_this_machine_reaches_itself() -> None:
    assert Reach.of_this_machine(open_network=False).includes(Reach.of_this_machine(open_network=True))
    assert json.dumps(Reach.of_this_machine(open_network=False).host)
