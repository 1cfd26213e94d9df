"""What is not published yet is published when a peer asks for it: the asker waits for that and for no longer."""

from concurrent.futures import Future

import numpy as np
import pytest

from tests.transport.asynchronous import asynchronous
from tests.transport.node_setup import Setup
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
async def test_what_is_published_in_time_is_pulled(kind: str) -> None:
    source, puller = open_two(kind)
    published, target = np.arange(NBYTES, dtype=np.uint8), np.zeros(NBYTES, np.uint8)
    arena = source.register(Memory(published.ctypes.data, NBYTES, owner=published))
    asked: list[str] = []

    def publish(name: str) -> Future[None]:
        asked.append(name)
        source.memory.publish(name, [arena.region(0, NBYTES)])
        done: Future[None] = Future()
        done.set_result(None)
        return done

    source.memory.publish_on_demand(publish)
    into = puller.register(Memory(target.ctypes.data, NBYTES, owner=target)).region(0, NBYTES)
    for _ in range(2):
        await puller.pull(await puller.lease(source.address, "late", 10.0), [into], 10.0)
    np.testing.assert_array_equal(target, published)
    assert asked == ["late"], "once it is published nobody is asked for it"
    source.memory.withdraw("late")
    await puller.close()
    await source.close()


@both
@asynchronous
async def test_what_nobody_publishes_is_not_offered(kind: str) -> None:
    source, puller = open_two(kind)
    in_vain, never = Future[None](), Future[None]()
    in_vain.set_result(None)
    answers = {"none": None, "in vain": in_vain, "too late": never}
    source.memory.publish_on_demand(lambda name: answers[name])
    for name in answers:
        with pytest.raises(NotOffered):
            await puller.lease(source.address, name, 1.0)
    await puller.close()
    await source.close()
