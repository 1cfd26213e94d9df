"""Who watches: nothing is collected for nobody, all are told the same, and who does not keep up is hung up on."""

import asyncio
from contextlib import AsyncExitStack

import pytest

from engine.api.errors import ApiError
from engine.api.page.event_feed import EventFeed
from engine.api.page.table_changes import Tables
from engine.errors import NotInTime
from tests.engine.api.page.test_table_changes import parsed


class Source:
    """Tables that differ each time; `collected` counts how often they were asked for."""

    def __init__(self) -> None:
        self.collected = 0
        self.fails: Exception | None = None

    async def collect(self) -> Tables:
        self.collected += 1
        if self.fails is not None:
            raise self.fails
        return {"server": {"": {"number": self.collected}}, "nodes": {"n": {}}}


def feed_of(source: Source, most: int = 4, period_s: float = 0.001) -> EventFeed:
    return EventFeed(source.collect, most, period_s=period_s)


async def test_nothing_is_collected_while_nobody_watches() -> None:
    source = Source()
    feed = feed_of(source)
    await asyncio.sleep(0.02)
    assert source.collected == 0
    async with feed.watch() as watcher:
        kind, first = parsed(await anext(watcher.events()))
        assert (kind, first["tables"]["server"][""]["number"]) == ("whole", 1)
        assert parsed(await anext(watcher.events()))[0] == "delta"
    before = source.collected
    await asyncio.sleep(0.02)
    assert (source.collected, len(feed)) == (before, 0)


async def test_who_comes_later_is_told_everything_first_and_then_what_all_are() -> None:
    feed = feed_of(Source())
    async with feed.watch() as first:
        events = first.events()
        for _ in range(3):
            await anext(events)
        async with feed.watch() as second:
            later = second.events()
            kind, told = parsed(await anext(later))
            assert (kind, told["tables"]["nodes"]) == ("whole", {"n": {}})
            after = await anext(later)
            async for event in events:
                if event == after:
                    break
            assert parsed(after)[1] == {
                "server": {"set": {"": {"number": told["tables"]["server"][""]["number"] + 1}}}
            }


async def test_who_does_not_keep_up_is_hung_up_on_and_nobody_else_is() -> None:
    feed, dropped = feed_of(Source()), asyncio.Event()
    async with feed.watch() as quick, feed.watch(dropped.set) as slow:
        events = quick.events()
        while not dropped.is_set():
            await asyncio.wait_for(anext(events), 10)
        assert parsed(await asyncio.wait_for(anext(events), 10))[0] == "delta"
        assert len([event async for event in slow.events()]) <= 8, "what waits is bounded"


async def test_more_than_may_watch_are_told_to_come_again() -> None:
    feed = feed_of(Source(), most=2)
    async with AsyncExitStack() as stack:
        for _ in range(2):
            await stack.enter_async_context(feed.watch())
        with pytest.raises(ApiError, match="--page-watchers") as refused:
            await stack.enter_async_context(feed.watch())
        assert (refused.value.status, refused.value.retry_after_s) == (503, 5)
    async with feed.watch():
        assert len(feed) == 1


async def test_all_streams_end_when_the_feed_does() -> None:
    source = Source()
    feed = feed_of(source)
    async with feed.watch() as watcher:
        await feed.close()
        before = source.collected
        assert len([event async for event in watcher.events()]) <= 1
        with pytest.raises(ApiError):
            async with feed.watch():
                pass
    await asyncio.sleep(0.01)
    assert source.collected == before


async def test_a_registry_that_does_not_answer_ends_nobody_and_a_fault_ends_all(
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = Source()
    feed = feed_of(source)
    async with feed.watch() as watcher:
        events = watcher.events()
        await anext(events)
        source.fails = NotInTime("nobody answers", 1)
        before = source.collected
        while source.collected < before + 3:
            await asyncio.sleep(0.001)
        assert not watcher.ended
        source.fails = RuntimeError("a fault")
        assert [parsed(event)[0] async for event in events] in ([], ["delta"], ["delta"] * 2)
    source.fails = None
    async with feed.watch() as watcher:
        assert parsed(await anext(watcher.events()))[0] == "whole"
    assert "nobody foresaw" in caplog.text
