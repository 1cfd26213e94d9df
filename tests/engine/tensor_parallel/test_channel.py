"""Messages arrive as they were sent, in order, with their bytes; a closed channel says so."""

import socket
import threading

import pytest

from engine.tensor_parallel.channel import ChannelClosed, WorkerChannel
from engine.tensor_parallel.messages import Failed, PlaceShard, ShardPlaced, Step


@pytest.fixture
def ends() -> tuple[WorkerChannel, WorkerChannel]:
    left, right = socket.socketpair()
    return WorkerChannel(left), WorkerChannel(right)


def test_messages_and_bytes_arrive_in_order(ends: tuple[WorkerChannel, WorkerChannel]) -> None:
    near, far = ends
    step = Step(4, (3, 1), (3, 9), (3, 9), 2, 1, ((0, 3, "d" * 64),), ((0, 1, "d" * 64),), replayed=False)
    bulk = bytes(range(256)) * 8192  # more than a socket holds
    place = PlaceShard("d", "header", 64, len(bulk))
    sender = threading.Thread(
        target=lambda: (near.send(step), near.send(place, memoryview(bulk)), near.send(ShardPlaced()))
    )
    sender.start()
    assert far.receive() == step
    assert far.receive() == place
    buffer = bytearray(len(bulk))
    far.receive_into(memoryview(buffer))
    assert buffer == bulk
    assert far.receive() == ShardPlaced()
    sender.join()
    near.close()
    far.close()


def test_a_closed_end_is_noticed_at_the_other(ends: tuple[WorkerChannel, WorkerChannel]) -> None:
    near, far = ends
    near.send(Failed("why"))
    near.close()
    assert far.receive() == Failed("why")
    with pytest.raises(ChannelClosed):
        far.receive()
    with pytest.raises(ChannelClosed):
        far.send(ShardPlaced())
    far.close()
    far.close()


def test_closing_wakes_whoever_waits(ends: tuple[WorkerChannel, WorkerChannel]) -> None:
    near, far = ends
    raised: list[Exception] = []

    def wait() -> None:
        try:
            near.receive()
        except ChannelClosed as closed:
            raised.append(closed)

    waiting = threading.Thread(target=wait)
    waiting.start()
    near.close()
    waiting.join(30)
    assert len(raised) == 1
    far.close()
