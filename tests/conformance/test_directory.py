"""What every directory owes: somebody to ask for everything, nobody twice, the best first, from any thread."""

from collections.abc import Callable

import pytest

from lora.peers.directory import Directory, KnownHolders, ReportedDirectory, StaticDirectory
from transport.base import Address

PEERS = tuple(Address("10.0.0.1", port) for port in range(1, 5))
ONE, OTHER = "0" * 64, "f" * 64

Make = Callable[[tuple[Address, ...]], Directory]


@pytest.fixture(params=["static", "reported"])
def make(request: pytest.FixtureRequest) -> Make:
    makers: dict[str, Make] = {
        "static": StaticDirectory,
        "reported": lambda peers: ReportedDirectory(KnownHolders(peers, {ONE: peers[2:]})),
    }
    return makers[request.param]


def test_every_peer_may_know_a_name_and_have_a_content(make: Make) -> None:
    directory = make(PEERS)
    assert tuple(directory.peers()) == PEERS
    for digest in (ONE, OTHER):
        holders = directory.holders(digest)
        assert sorted(holders) == sorted(PEERS)
        assert len(holders) == len(set(holders))
        assert list(holders) == list(directory.holders(digest)), "the order is defined"


def test_nobody_is_a_fine_answer(make: Make) -> None:
    directory = make(())
    assert list(directory.peers()) == list(directory.holders(OTHER)) == []


def test_a_fed_directory_names_known_holders_first_and_forgets_old_news() -> None:
    directory = ReportedDirectory(KnownHolders(PEERS))
    assert directory.holders(ONE) == PEERS
    directory.update(KnownHolders(PEERS, {ONE: (PEERS[3], PEERS[1])}))
    assert directory.holders(ONE) == (PEERS[3], PEERS[1], PEERS[0], PEERS[2])
    assert directory.holders(OTHER) == PEERS
    directory.update(KnownHolders(PEERS[:1]))
    assert directory.holders(ONE) == PEERS[:1]


def test_a_holder_that_is_no_peer_is_asked_too() -> None:
    stranger = Address("10.0.0.9", 9)
    directory = ReportedDirectory(KnownHolders(PEERS[:1], {ONE: (stranger,)}))
    assert directory.holders(ONE) == (stranger, PEERS[0])
