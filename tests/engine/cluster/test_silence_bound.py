"""A silent peer is given up; one that spoke while this process was held up is not."""

import asyncio
import time

import pytest

from engine.cluster.link.silence_bound import silence_bound

TURN_S, TURNS = 0.05, 6
HELD_UP_S = 3 * TURN_S * TURNS


async def _listen(spoken: asyncio.Queue[None], words: int) -> int:
    heard = 0
    async with silence_bound(TURN_S, TURNS) as hear:
        while heard < words:
            await spoken.get()
            hear()
            heard += 1
    return heard


def test_a_peer_that_says_nothing_is_given_up() -> None:
    with pytest.raises(TimeoutError):
        asyncio.run(_listen(asyncio.Queue(), 1))


def test_a_peer_that_falls_silent_is_given_up() -> None:
    async def session() -> int:
        spoken: asyncio.Queue[None] = asyncio.Queue()
        spoken.put_nowait(None)
        return await _listen(spoken, 2)

    with pytest.raises(TimeoutError):
        asyncio.run(session())


def test_a_process_that_was_held_up_for_long_loses_nobody() -> None:
    async def session() -> int:
        spoken: asyncio.Queue[None] = asyncio.Queue()
        listening = asyncio.create_task(_listen(spoken, 3))
        await asyncio.sleep(TURN_S / 2)
        time.sleep(HELD_UP_S)
        loop = asyncio.get_running_loop()
        for turn in (1, 2, 3):  # what the peer says comes once the process reads its sockets again
            loop.call_later(turn * TURN_S / 2, spoken.put_nowait, None)
        return await listening

    assert asyncio.run(session()) == 3


def test_an_end_from_outside_is_no_silence() -> None:
    async def session() -> bool:
        listening = asyncio.create_task(_listen(asyncio.Queue(), 1))
        await asyncio.sleep(TURN_S)
        listening.cancel()
        await asyncio.wait({listening})
        return listening.cancelled()

    assert asyncio.run(session())
