"""End what waits for a peer that has become silent, and only then.

Silence is counted in turns of this process's own event loop. A process that was halted, or had no processor for a
while, finds what its peers said meanwhile waiting in its sockets. By the clock it would take all of them for lost at
once, and move every stream that they have.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager


@asynccontextmanager
async def silence_bound(turn_s: float, turns: int) -> AsyncGenerator[Callable[[], None]]:
    """Raise TimeoutError in the body once so many turns of `turn_s` pass without a call of what is yielded."""
    silent = 0

    def hear() -> None:
        nonlocal silent
        silent = 0

    async def watch(limit: asyncio.Timeout) -> None:
        nonlocal silent
        while silent < turns:
            await asyncio.sleep(turn_s)
            silent += 1
        limit.reschedule(asyncio.get_running_loop().time())

    async with asyncio.timeout(None) as limit:
        watching = asyncio.create_task(watch(limit))
        try:
            yield hear
        finally:
            watching.cancel()
