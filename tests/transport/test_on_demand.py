"""What is not lent yet is brought when a peer asks for it: the asker waits for that and for no longer."""

from concurrent.futures import Future

import numpy as np
import pytest

from tests.transport.asynchronous import asynchronous
from tests.transport.setup import Setup
from transport.base import Memory, Transport
from transport.errors import NotOffered
from transport.loopback import LoopbackNetwork, LoopbackTransport

NBYTES = 4096


def open_two(kind: str) -> tuple[Transport, Transport]:
    """A source and a puller of the same kind."""
    if kind == "loopback":
        network = LoopbackNetwork()
        return LoopbackTransport("source", network), LoopbackTransport("puller", network)
    return Setup().open("source"), Setup().open("puller")


both = pytest.mark.parametrize("kind", ["loopback", "stream"])


@both
@asynchronous
async def test_what_is_brought_in_time_is_pulled(kind: str) -> None:
    source, puller = open_two(kind)
    lent, room = np.arange(NBYTES, dtype=np.uint8), np.zeros(NBYTES, np.uint8)
    arena = source.register(Memory(lent.ctypes.data, NBYTES, owner=lent))
    asked: list[str] = []

    def bring(name: str) -> Future[None]:
        asked.append(name)
        source.publish(name, [arena.region(0, NBYTES)])
        brought: Future[None] = Future()
        brought.set_result(None)
        return brought

    source.lend_on_demand(bring)
    into = puller.register(Memory(room.ctypes.data, NBYTES, owner=room)).region(0, NBYTES)
    for _ in range(2):
        await puller.pull(await puller.lease(source.address, "late", 10.0), [into], 10.0)
    np.testing.assert_array_equal(room, lent)
    assert asked == ["late"], "once it is lent nobody is asked to bring it"
    source.withdraw("late")
    await puller.close()
    await source.close()


@both
@asynchronous
async def test_what_nobody_brings_is_not_offered(kind: str) -> None:
    source, puller = open_two(kind)
    in_vain, never = Future[None](), Future[None]()
    in_vain.set_result(None)
    answers = {"none": None, "in vain": in_vain, "too late": never}
    source.lend_on_demand(lambda name: answers[name])
    for name in answers:
        with pytest.raises(NotOffered):
            await puller.lease(source.address, name, 1.0)
    await puller.close()
    await source.close()
