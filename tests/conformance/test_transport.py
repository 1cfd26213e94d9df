"""What every transport owes: exact bytes, nothing beside them, pins that end, destinations that are never written late.

The same tests run in one process (loopback), over TLS and plain streams, and through UCX; the network ones pull from
another process.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from tests.transport.asynchronous import asynchronous
from tests.transport.node_setup import MIB
from tests.transport.pattern import content
from tests.transport.rig import ARENA_BYTES, GUARD, KINDS, Rig, Sources, needs_nixl, open_rig
from tests.transport.sources import ProcessSource
from transport.base import Address, Memory, Region
from transport.errors import (
    LeaseExpired,
    NotOffered,
    PeerGone,
    PullTimeout,
    RegionBusy,
    RegionRefused,
    TransportClosed,
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sources]:
    running = Sources(tmp_path_factory.mktemp("certificates"))
    yield running
    running.close()


GIB = 1 << 30
GUARDS = 5, 3
SHIFTED = [("stream", 16), pytest.param("ucx", 32, marks=needs_nixl)]

Opened = Callable[[], AbstractAsyncContextManager[Rig]]
Way = Callable[[Rig, str, Sequence[Region]], Awaitable[None]]


@pytest.fixture(params=KINDS)
def opened(request: pytest.FixtureRequest, sources: Sources) -> Opened:
    """Opens the rig of one transport inside the test's event loop."""
    return partial(open_rig, request.param, sources)


@pytest.mark.parametrize("nbytes", [1, 2, 63, 4095, 4096, 65_537, MIB + 1, 16 * MIB])
@asynchronous
async def test_every_size_arrives_exactly_and_nothing_beside_it(opened: Opened, nbytes: int) -> None:
    async with opened() as rig:
        rig.source.publish("size", [(13, nbytes)])
        await rig.fetch("size", [rig.into(7, nbytes)])
        np.testing.assert_array_equal(rig.target[7 : 7 + nbytes], content(13, nbytes))
        assert (rig.target[:7] == GUARD).all()
        assert (rig.target[7 + nbytes :] == GUARD).all()
        assert await rig.is_clean("size")


@pytest.mark.parametrize(("start", "end"), [(0, 1), (1, 0), (3, 5), (4095, 4097), (8, 64)])
@asynchronous
async def test_alignment_does_not_matter(opened: Opened, start: int, end: int) -> None:
    nbytes = 300_001
    async with opened() as rig:
        rig.source.publish("odd", [(start, nbytes)])
        await rig.pull("odd", [rig.into(end, nbytes)])
        np.testing.assert_array_equal(rig.target[end : end + nbytes], content(start, nbytes))
        assert await rig.is_clean("odd")


@asynchronous
async def test_scattered_regions_are_laid_over_each_other_in_order(opened: Opened) -> None:
    rng = np.random.default_rng(5)
    lengths = rng.integers(1, 30_000, 300)
    spans = [
        (int(offset), int(nbytes))
        for offset, nbytes in zip(rng.integers(0, 64 * MIB, 300), lengths, strict=True)
    ]
    total = int(lengths.sum())
    cuts = [0, *sorted(int(cut) for cut in rng.choice(total - 1, 99, replace=False) + 1), total]
    targets = [(2 * start, stop - start) for start, stop in pairwise(cuts)]
    async with opened() as rig:
        rig.source.publish("pages", spans)
        await rig.pull("pages", [rig.into(*target) for target in targets])
        got = np.concatenate([rig.target[offset : offset + nbytes] for offset, nbytes in targets])
        np.testing.assert_array_equal(got, np.concatenate([content(*span) for span in spans]))
        assert (rig.target == GUARD).sum() >= rig.target.size - total
        assert await rig.is_clean("pages")


@pytest.mark.parametrize("way", [Rig.pull, Rig.fetch])
@asynchronous
async def test_two_hundred_pulls_at_once(opened: Opened, way: Way) -> None:
    nbytes, stride = 40_000, 50_001
    async with opened() as rig:
        for index in range(200):
            rig.source.publish(f"adapter {index}", [(index * stride, nbytes)])
        pulls = [way(rig, f"adapter {index}", [rig.into(index * stride, nbytes)]) for index in range(200)]
        await asyncio.gather(*pulls)
        for index in range(200):
            start = index * stride
            np.testing.assert_array_equal(rig.target[start : start + nbytes], content(start, nbytes))
            assert (rig.target[start + nbytes : start + stride] == GUARD).all()
            assert await rig.is_clean(f"adapter {index}")
        assert rig.source.usage().leases == 0


@asynchronous
async def test_what_cannot_be_fetched_is_refused_by_name_and_nothing_is_left(opened: Opened) -> None:
    async with opened() as rig:
        rig.source.publish("ten", [(0, 10)])
        rig.puller.memory.publish("ours", [rig.into(50, 100)])
        for name, into, error in (
            ("ten", rig.into(0, 11), RegionRefused),
            ("ten", rig.into(0, 9), RegionRefused),
            ("absent", rig.into(0, 10), NotOffered),
            ("ten", rig.into(45, 10), RegionBusy),
        ):
            with pytest.raises(error):
                await rig.fetch(name, [into])
        with pytest.raises(PullTimeout):
            await rig.fetch("ten", [rig.into(0, 10)], 0.0)
        assert (rig.target == GUARD).all()
        await rig.fetch("ten", [rig.into(0, 10)])
        np.testing.assert_array_equal(rig.target[:10], content(0, 10))
        assert await rig.is_clean("ten")


@asynchronous
async def test_a_cancelled_fetch_settles_and_gives_its_pin_back(opened: Opened) -> None:
    async with opened() as rig:
        rig.source.publish("given up", [(0, 64 * MIB)])
        for turns in range(8):
            fetching = asyncio.ensure_future(rig.fetch("given up", [rig.into(0, 64 * MIB)]))
            for _ in range(turns):
                await asyncio.sleep(0)
            fetching.cancel()
            await asyncio.wait((fetching,))
            assert fetching.cancelled() or fetching.exception() is None  # it may have been faster
            await asyncio.wrap_future(rig.puller.memory.settled(rig.into(0, 64 * MIB)))
        assert await rig.is_clean("given up")


@asynchronous
async def test_many_pulls_of_one_name_share_its_pages(opened: Opened) -> None:
    async with opened() as rig:
        rig.source.publish("popular", [(0, 100_000)])
        await asyncio.gather(*(rig.pull("popular", [rig.into(k * 100_000, 100_000)]) for k in range(20)))
        np.testing.assert_array_equal(rig.target[: 20 * 100_000], np.tile(content(0, 100_000), 20))
        assert await rig.is_clean("popular")


@asynchronous
async def test_a_name_that_is_not_published_is_refused_by_name(opened: Opened) -> None:
    async with opened() as rig:
        with pytest.raises(NotOffered, match="'absent'"):
            await rig.puller.lease(rig.source.address, "absent", 5.0)
        rig.source.publish("present", [(0, 10)])
        await rig.pull("present", [rig.into(0, 10)])
        assert await rig.is_clean("present")


@asynchronous
async def test_sizes_that_differ_are_refused_and_the_lease_ends(opened: Opened) -> None:
    async with opened() as rig:
        rig.source.publish("ten", [(0, 10)])
        lease = await rig.puller.lease(rig.source.address, "ten", 30.0)
        with pytest.raises(RegionRefused, match="10 bytes, its destination 11"):
            await rig.puller.pull(lease, [rig.into(0, 11)], 5.0)
        assert (rig.target == GUARD).all()
        assert await rig.is_clean("ten")


@asynchronous
async def test_a_region_must_lie_in_its_arena(opened: Opened) -> None:
    async with opened() as rig:
        for offset, nbytes in [(-1, 5), (0, 0), (ARENA_BYTES, 1), (ARENA_BYTES - 1, 2), (0, ARENA_BYTES + 1)]:
            with pytest.raises(RegionRefused):
                rig.into(offset, nbytes)


@asynchronous
async def test_a_destination_belongs_to_one_pull_at_a_time(opened: Opened) -> None:
    async with opened() as rig:
        rig.source.publish("contended", [(0, 8 * MIB)])
        first, second = [await rig.puller.lease(rig.source.address, "contended", 30.0) for _ in range(2)]
        pulling = asyncio.gather(
            rig.puller.pull(first, [rig.into(0, 8 * MIB)], 30.0),
            rig.puller.pull(second, [rig.into(8 * MIB - 1, 8 * MIB)], 30.0),
            return_exceptions=True,
        )
        won, lost = await pulling
        assert won is None
        assert isinstance(lost, RegionBusy)
        np.testing.assert_array_equal(rig.target[: 8 * MIB], content(0, 8 * MIB))
        assert (rig.target[8 * MIB :] == GUARD).all()
        assert await rig.is_clean("contended")


@asynchronous
async def test_what_is_published_is_not_pulled_over_and_a_destination_is_not_published(
    opened: Opened,
) -> None:
    async with opened() as rig:
        rig.source.publish("fresh", [(0, 100)])
        rig.puller.memory.publish("ours", [rig.into(50, 100)])
        lease = await rig.puller.lease(rig.source.address, "fresh", 30.0)
        with pytest.raises(RegionBusy, match="are published"):
            await rig.puller.pull(lease, [rig.into(0, 100)], 5.0)
        assert rig.puller.memory.withdraw("ours").done()
        lease = await rig.puller.lease(rig.source.address, "fresh", 30.0)
        pulling = asyncio.ensure_future(rig.puller.pull(lease, [rig.into(0, 100)], 30.0))
        while rig.puller.memory.usage().destinations == 0 and not pulling.done():
            await asyncio.sleep(0)
        if not pulling.done():
            with pytest.raises(RegionBusy, match="may still land"):
                rig.puller.memory.publish("half", [rig.into(99, 1)])
        await pulling
        assert await rig.is_clean("fresh")


@asynchronous
async def test_pages_stay_pinned_until_the_lease_is_released(opened: Opened) -> None:
    async with opened() as rig:
        rig.source.publish("pinned", [(0, 1000)])
        lease = await rig.puller.lease(rig.source.address, "pinned", 30.0)
        assert rig.source.usage().leases == 1
        assert not rig.source.withdraw("pinned")
        with pytest.raises(NotOffered):
            await rig.puller.lease(rig.source.address, "pinned", 5.0)
        await rig.puller.release(lease)
        assert await rig.source.drained("pinned", 30.0)
        await rig.puller.release(lease)
        with pytest.raises(LeaseExpired):
            await rig.puller.pull(lease, [rig.into(0, 1000)], 5.0)
        assert rig.source.usage().leases == 0


@asynchronous
async def test_a_name_withdrawn_during_a_lease_can_still_be_pulled_whole(opened: Opened) -> None:
    async with opened() as rig:
        rig.source.publish("leaving", [(5, 2 * MIB)])
        lease = await rig.puller.lease(rig.source.address, "leaving", 30.0)
        assert not rig.source.withdraw("leaving")
        await rig.puller.pull(lease, [rig.into(0, 2 * MIB)], 30.0)
        np.testing.assert_array_equal(rig.target[: 2 * MIB], content(5, 2 * MIB))
        assert await rig.source.drained("leaving", 30.0)


@asynchronous
async def test_a_lease_ends_at_its_deadline_though_nobody_asks(opened: Opened) -> None:
    async with opened() as rig:
        rig.source.publish("brief", [(0, 1000)])
        expired = rig.source.usage().endings["expired"]
        lease = await rig.puller.lease(rig.source.address, "brief", 1.0)
        assert not rig.source.withdraw("brief")
        assert await rig.source.drained("brief", 30.0)
        assert rig.source.usage().endings["expired"] == expired + 1
        with pytest.raises((LeaseExpired, PeerGone)):
            await rig.puller.pull(lease, [rig.into(0, 1000)], 5.0)
        assert (rig.target == GUARD).all()


@asynchronous
async def test_no_time_at_all_is_a_timeout_and_harms_nothing(opened: Opened) -> None:
    async with opened() as rig:
        rig.source.publish("late", [(0, 4 * MIB)])
        lease = await rig.puller.lease(rig.source.address, "late", 30.0)
        with pytest.raises(PullTimeout):
            await rig.puller.pull(lease, [rig.into(0, 4 * MIB)], 0.0)
        await asyncio.wait_for(asyncio.wrap_future(rig.puller.memory.settled(rig.into(0, 4 * MIB))), 30.0)
        await rig.pull("late", [rig.into(0, 4 * MIB)])
        np.testing.assert_array_equal(rig.target[: 4 * MIB], content(0, 4 * MIB))
        assert await rig.is_clean("late")


@asynchronous
async def test_a_cancelled_pull_settles_and_gives_its_pin_back(opened: Opened) -> None:
    async with opened() as rig:
        rig.source.publish("given up", [(0, 64 * MIB)])
        lease = await rig.puller.lease(rig.source.address, "given up", 30.0)
        pulling = asyncio.ensure_future(rig.puller.pull(lease, [rig.into(0, 64 * MIB)], 30.0))
        await asyncio.sleep(0)
        pulling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pulling
        assert await rig.is_clean("given up")


@asynchronous
async def test_a_closed_transport_says_so(opened: Opened) -> None:
    async with opened() as rig:
        rig.source.publish("shut", [(0, 10)])
        await rig.puller.close()
        with pytest.raises(TransportClosed):
            await rig.puller.lease(rig.source.address, "shut", 5.0)
        assert await rig.is_clean("shut")


@asynchronous
async def test_nobody_there_is_peer_gone(opened: Opened) -> None:
    async with opened() as rig:
        with pytest.raises(PeerGone, match="another source"):
            await rig.puller.lease(Address("127.0.0.1", 1), "anything", 5.0)


@pytest.fixture(scope="module")
def gibibyte() -> NDArray[np.uint8]:
    """Memory for it and a guard at either end, for all transports."""
    if psutil.virtual_memory().available < 2 * GIB:
        pytest.skip("less than 2 GiB of memory are free")
    target = np.empty(GUARDS[0] + GIB + GUARDS[1], np.uint8)
    target[: GUARDS[0]] = target[-GUARDS[1] :] = GUARD
    return target


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "shift"), SHIFTED)
@asynchronous
async def test_a_gibibyte_arrives_exactly(
    sources: Sources, gibibyte: NDArray[np.uint8], kind: str, shift: int
) -> None:
    """From odd spans of an arena that is smaller, so that no source needs as much, into one odd span. The `shift`
    makes every byte that another transport left there wrong."""
    spans = [(shift + index + 1, 64 * MIB + 2 * index + 1) for index in range(15)]
    spans.append((100, GIB - sum(nbytes for _, nbytes in spans)))
    pattern = content(0, ARENA_BYTES)
    async with open_rig(kind, sources, gibibyte) as rig:
        rig.source.publish("large", spans)
        await rig.fetch("large", [rig.into(GUARDS[0], GIB)])
        start = GUARDS[0]
        for offset, nbytes in spans:
            assert np.array_equal(gibibyte[start : start + nbytes], pattern[offset : offset + nbytes])
            start += nbytes
        assert start == GUARDS[0] + GIB
        assert (gibibyte[: GUARDS[0]] == GUARD).all()
        assert (gibibyte[start:] == GUARD).all()
        assert await rig.is_clean("large")


@needs_nixl
@pytest.mark.parametrize(("path", "taken"), [("auto", "ucx"), ("stream", "stream")])
@asynchronous
async def test_on_one_host_ucx_is_taken_unless_the_setting_says_otherwise(
    sources: Sources, path: str, taken: str
) -> None:
    source, puller = sources.of("ucx"), replace(sources.setup("ucx"), path=path).open("puller")
    target = np.full(1000, GUARD, np.uint8)
    arena = puller.register(Memory(target.ctypes.data, target.nbytes, owner=target))
    rig = Rig(source, puller, target, arena)
    source.publish("either way", [(0, 1000)])
    await rig.pull("either way", [rig.into(0, 1000)])
    assert puller.memory.usage().pulled_bytes == {taken: 1000}
    assert await rig.is_clean("either way")
    await puller.close()


@pytest.mark.parametrize("kind", KINDS[1:])
@asynchronous
async def test_a_source_that_dies_during_a_lease_is_gone_at_once(sources: Sources, kind: str) -> None:
    source, puller = ProcessSource(sources.setup(kind)), sources.setup(kind).open("puller")
    target = np.full(MIB, GUARD, np.uint8)
    arena = puller.register(Memory(target.ctypes.data, target.nbytes, owner=target))
    rig = Rig(source, puller, target, arena)
    source.publish("dying", [(0, MIB)])
    await rig.pull("dying", [rig.into(0, MIB)])
    lease = await puller.lease(source.address, "dying", 60.0)
    source.child.kill()
    with pytest.raises(PeerGone):
        await puller.pull(lease, [rig.into(0, MIB)], 60.0)
    await asyncio.wait_for(asyncio.wrap_future(puller.memory.settled(rig.into(0, MIB))), 30.0)
    with pytest.raises(PeerGone):
        await puller.lease(source.address, "dying", 60.0)
    await puller.close()


@pytest.mark.parametrize("kind", KINDS[1:])
@asynchronous
async def test_a_frozen_source_confirms_nothing(sources: Sources, kind: str) -> None:
    source, puller = ProcessSource(sources.setup(kind)), sources.setup(kind).open("puller")
    target = np.full(MIB, GUARD, np.uint8)
    arena = puller.register(Memory(target.ctypes.data, target.nbytes, owner=target))
    rig = Rig(source, puller, target, arena)
    source.publish("silent", [(0, MIB)])
    lease = await puller.lease(source.address, "silent", 60.0)
    source.child.stop()
    with pytest.raises(PullTimeout):
        await puller.pull(lease, [rig.into(0, MIB)], 1.0)
    source.child.resume()
    assert await rig.is_clean("silent")
    await puller.close()
    source.child.close()
