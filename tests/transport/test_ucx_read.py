"""A read that was given up keeps its destination until UCX says that it has ended, and not a moment less."""

import ctypes
import socket
import threading
from collections.abc import Iterator

import pytest

from transport.base import Memory
from transport.control.connection import Connection, Deadline
from transport.control.messages import Refusal, encode
from transport.errors import LeaseExpired, PeerGone, PullTimeout
from transport.memory.destinations import Destinations
from transport.memory.local_memory import LocalMemory
from transport.paths.nixl_agent import ReadState
from transport.paths.ucx_read import UcxRead

MEMORY = ctypes.create_string_buffer(16)
REGION = LocalMemory("test").register(Memory(ctypes.addressof(MEMORY), 16, owner=MEMORY)).region(0, 16)


class FakeRead:
    """Runs until told how to end."""

    def __init__(self) -> None:
        self.ending = ReadState.RUNNING
        self.released = threading.Event()

    def state(self) -> ReadState:
        return self.ending

    def release(self) -> None:
        assert self.ending is not ReadState.RUNNING
        self.released.set()


@pytest.fixture
def ends() -> Iterator[tuple[Connection, socket.socket]]:
    listener = socket.create_server(("127.0.0.1", 0))
    ours = socket.create_connection(listener.getsockname())
    theirs, _ = listener.accept()
    with listener, theirs:
        connection = Connection(ours, "the source")
        yield connection, theirs
        connection.close()


Ends = tuple[Connection, socket.socket]


@pytest.mark.parametrize(("ending", "done"), [(ReadState.DONE, True), (ReadState.FAILED, False)])
def test_a_read_that_ends_ends_the_landing(ends: Ends, ending: ReadState, done: bool) -> None:
    destinations, read, ended = Destinations(), FakeRead(), threading.Event()
    destination = destinations.claim([REGION])
    watched = UcxRead(destination, ends[0], Deadline.after(30.0))
    read.ending = ending
    assert watched.complete(read, ended.set) is done
    assert ended.is_set()
    assert read.released.is_set()
    assert not destination.settled.done()
    watched.end()
    assert destination.settled.done()
    assert destinations.count() == (0, 0)


@pytest.mark.parametrize("ending", [ReadState.DONE, ReadState.FAILED])
def test_a_read_that_was_given_up_is_quarantined_until_it_ends(ends: Ends, ending: ReadState) -> None:
    destinations, read, ended = Destinations(), FakeRead(), threading.Event()
    destination = destinations.claim([REGION])
    watched = UcxRead(destination, ends[0], Deadline.after(0.0))
    with pytest.raises(PullTimeout):
        watched.complete(read, ended.set)
    watched.end()
    assert destinations.count() == (1, 1)
    assert not ended.is_set()
    assert not destination.settled.done()
    read.ending = ending
    destination.settled.result(30.0)
    assert read.released.is_set()
    assert ended.is_set()
    assert destinations.count() == (0, 0)


def test_a_source_that_ends_the_lease_ends_the_wait(ends: Ends) -> None:
    connection, theirs = ends
    theirs.sendall(encode(Refusal("LeaseExpired", "too late")))
    watched = UcxRead(Destinations().claim([REGION]), connection, Deadline.after(30.0))
    with pytest.raises(LeaseExpired, match="too late"):
        watched.complete(FakeRead(), lambda: None)


def test_a_source_that_hangs_up_ends_the_wait(ends: Ends) -> None:
    connection, theirs = ends
    theirs.close()
    watched = UcxRead(Destinations().claim([REGION]), connection, Deadline.after(30.0))
    with pytest.raises(PeerGone, match="the source"):
        watched.complete(FakeRead(), lambda: None)


def test_a_cancelled_pull_ends_the_wait(ends: Ends) -> None:
    ends[0].abort()
    watched = UcxRead(Destinations().claim([REGION]), ends[0], Deadline.after(30.0))
    with pytest.raises(PeerGone):
        watched.complete(FakeRead(), lambda: None)
