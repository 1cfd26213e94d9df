"""Work in threads, awaited: never beyond a deadline, and never in a queue without an end."""

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

import pytest

from engine.errors import NotInTime
from engine.waiting.task_pool import TaskPool

ENOUGH_S = 30


def _run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, ENOUGH_S))


def test_a_burst_waits_its_turn() -> None:
    async def scenario() -> None:
        pool = TaskPool("test", 2)
        assert await asyncio.gather(*(pool.run(lambda: 7) for _ in range(2000))) == [7] * 2000
        pool.close()

    _run(scenario())


def test_errors_of_the_work_are_raised_as_they_are() -> None:
    async def scenario() -> None:
        pool = TaskPool("test", 1)
        with pytest.raises(ValueError, match="invalid literal"):
            await pool.run(lambda: int("x"))
        pool.close()

    _run(scenario())


def test_work_that_hangs_ends_for_its_waiter_and_what_waits_behind_it_is_never_begun() -> None:
    async def scenario() -> None:
        pool, gate, begun = TaskPool("hanging", 1, timeout_s=0.05), threading.Event(), threading.Event()
        waits = [pool.run(lambda: gate.wait(ENOUGH_S)), pool.run(begun.set)]
        for answer in await asyncio.gather(*waits, return_exceptions=True):
            assert isinstance(answer, NotInTime)
            assert str(answer) == "hanging work was not done within 0.05 s: retry in 1 s"
        gate.set()
        assert await TaskPool("other", 1).run(lambda: 7) == 7
        assert not begun.is_set()
        pool.close()

    _run(scenario())


def test_a_full_queue_refuses_at_once() -> None:
    async def scenario() -> None:
        pool, gate = TaskPool("busy", 1, most_queued=1), threading.Event()
        waits = [asyncio.create_task(pool.run(lambda: gate.wait(ENOUGH_S))) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(NotInTime, match="too much busy work waits already: retry in 1 s"):
            await pool.run(lambda: True)
        gate.set()
        assert all(await asyncio.gather(*waits))
        pool.close()

    _run(scenario())
