"""How hard each peer is asked: so many pulls at once, so many bytes per second, over every transport.

Nothing waits for real time: the puller's clock stands still, and whoever sleeps on it tells for how long.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from itertools import cycle
from types import SimpleNamespace

import numpy as np
import pytest

from lora.peers import puller as puller_module
from lora.peers.puller import Puller, PullLimits
from lora.peers.regions import ManifestBuffers
from tests.transport.asynchronous import asynchronous
from tests.transport.pattern import content
from tests.transport.rig import GUARD, KINDS, Rig, Sources, open_rig
from transport.base import Address, Region
from transport.loopback import LoopbackNetwork, LoopbackTransport

NBYTES = 40_000
PULLS = 12
NOTES_BYTES = 4096
RATE = 1e6  # bytes per second
STEP_S = NBYTES / RATE

Opened = Callable[[], AbstractAsyncContextManager[Rig]]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sources]:
    running = Sources(tmp_path_factory.mktemp("certificates"))
    yield running
    running.close()


@pytest.fixture(params=KINDS)
def opened(request: pytest.FixtureRequest, sources: Sources) -> Opened:
    return partial(open_rig, request.param, sources)


class Clock:
    """Stands still; `slept_s` is how long each sleeper wanted to sleep."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.slept_s: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.slept_s.append(seconds)
        await asyncio.sleep(0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(puller_module, "time", SimpleNamespace(monotonic=lambda: fake.now_s))
    loop = SimpleNamespace(sleep=fake.sleep, Semaphore=asyncio.Semaphore)
    monkeypatch.setattr(puller_module, "asyncio", loop)
    return fake


class Turnstile(LoopbackTransport):
    """Counts who is inside, per peer, and lets nobody on before `gate` is set. All peers are the rig's source."""

    def __init__(self, rig: Rig) -> None:
        super().__init__("turnstile", LoopbackNetwork())
        self._rig = rig
        self.gate = asyncio.Event()
        self.inside: Counter[Address] = Counter()
        self.most: Counter[Address] = Counter()

    async def fetch(self, peer: Address, name: str, into: Sequence[Region], timeout_s: float) -> None:
        self.inside[peer] += 1
        self.most[peer] = max(self.most[peer], self.inside[peer])
        await self.gate.wait()
        await self._rig.puller.fetch(self._rig.source.address, name, into, timeout_s)
        self.inside[peer] -= 1


async def pull_all(
    rig: Rig, puller: Puller, peers: Sequence[Address], gate: asyncio.Event | None = None
) -> None:
    """PULLS pulls of each peer at once, each to a place of its own; exact bytes."""
    places = [rig.into(index * NBYTES, NBYTES) for index in range(PULLS * len(peers))]
    tasks = [
        asyncio.ensure_future(puller.pull(peer, "adapter", into))
        for peer, into in zip(cycle(peers), places, strict=False)
    ]
    for _ in range(10 * len(tasks)):
        await asyncio.sleep(0)
    if gate is not None:
        assert not any(task.done() for task in tasks)
        gate.set()
    await asyncio.gather(*tasks)
    filled = len(tasks) * NBYTES
    np.testing.assert_array_equal(rig.target[:filled], np.tile(content(0, NBYTES), len(tasks)))
    assert (rig.target[filled:] == GUARD).all()


@pytest.mark.slow
@asynchronous
async def test_no_peer_is_asked_for_more_at_once_than_allowed_and_each_for_as_much(opened: Opened) -> None:
    async with opened() as rig:
        rig.source.publish("adapter", [(0, NBYTES)])
        turnstile = Turnstile(rig)
        puller = Puller(turnstile, ManifestBuffers(rig.puller, NOTES_BYTES), PullLimits(pulls=3))
        peers = [Address("one", 1), Address("other", 2)]
        await pull_all(rig, puller, peers, turnstile.gate)
        assert turnstile.most == dict.fromkeys(peers, 3)
        assert not any(turnstile.inside.values())
        assert await rig.is_clean("adapter")


@asynchronous
async def test_a_failed_pull_gives_its_seat_to_the_next(opened: Opened, clock: Clock) -> None:
    async with opened() as rig:
        rig.source.publish("adapter", [(0, NBYTES)])
        puller = Puller(rig.puller, ManifestBuffers(rig.puller, NOTES_BYTES), PullLimits(pulls=1))
        nobody, into = Address("127.0.0.1", 1), rig.into(0, NBYTES)
        failed = await asyncio.gather(
            *(puller.pull(nobody, "adapter", into) for _ in range(3)), return_exceptions=True
        )
        assert [type(error).__name__ for error in failed] == ["PeerGone"] * 3
        await puller.pull(rig.source.address, "adapter", into)
        assert await rig.is_clean("adapter")


@asynchronous
async def test_bytes_are_asked_for_no_faster_than_allowed(opened: Opened, clock: Clock) -> None:
    async with opened() as rig:
        rig.source.publish("adapter", [(0, NBYTES)])
        limits = PullLimits(pulls=PULLS, bytes_per_s=RATE)
        puller = Puller(rig.puller, ManifestBuffers(rig.puller, NOTES_BYTES), limits)
        await pull_all(rig, puller, [rig.source.address])
        np.testing.assert_allclose(clock.slept_s, STEP_S * np.arange(PULLS), atol=1e-9)
        assert await rig.is_clean("adapter")


@asynchronous
async def test_each_peer_has_a_rate_of_its_own(opened: Opened, clock: Clock) -> None:
    async with opened() as rig:
        rig.source.publish("adapter", [(0, NBYTES)])
        turnstile = Turnstile(rig)
        turnstile.gate.set()
        limits = PullLimits(pulls=PULLS, bytes_per_s=RATE)
        puller = Puller(turnstile, ManifestBuffers(rig.puller, NOTES_BYTES), limits)
        await pull_all(rig, puller, [Address("one", 1), Address("other", 2)])
        np.testing.assert_allclose(clock.slept_s, STEP_S * np.arange(PULLS).repeat(2), atol=1e-9)
        assert await rig.is_clean("adapter")


@asynchronous
async def test_time_without_pulls_is_not_saved_up(sources: Sources, clock: Clock) -> None:
    async with open_rig("loopback", sources) as rig:
        rig.source.publish("adapter", [(0, NBYTES)])
        puller = Puller(rig.puller, ManifestBuffers(rig.puller, NOTES_BYTES), PullLimits(bytes_per_s=RATE))
        into = rig.into(0, NBYTES)
        for idle_s in (0.0, STEP_S / 2, 3600.0, 0.0):
            clock.now_s += idle_s
            await puller.pull(rig.source.address, "adapter", into)
        np.testing.assert_allclose(clock.slept_s, [0.0, STEP_S / 2, 0.0, STEP_S], atol=1e-9)


@asynchronous
async def test_without_a_bound_nobody_sleeps(sources: Sources, clock: Clock) -> None:
    async with open_rig("loopback", sources) as rig:
        rig.source.publish("adapter", [(0, NBYTES)])
        puller = Puller(rig.puller, ManifestBuffers(rig.puller, NOTES_BYTES), PullLimits())
        await pull_all(rig, puller, [rig.source.address])
        assert clock.slept_s == []
