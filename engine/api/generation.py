"""Generation: one Ask on its way through a desk, all prompts at once, and the count of what it took."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from itertools import chain

from engine.api.desk import DeltaStream, Desk
from engine.api.openai import Ask
from engine.text import Delta


class Generation:
    """`submit` every prompt, or raise and leave none behind; iterate once for (choice index, Delta), where choices
    count over the prompts and then over `n`; `aclose` whatever happened."""

    def __init__(self, desk: Desk, ask: Ask, response_id: str) -> None:
        self._desk = desk
        self._ask = ask
        self.response_id = response_id
        self._streams: list[DeltaStream] = []
        self._merged: AsyncGenerator[tuple[int, Delta], None] | None = None
        self._output_tokens = 0

    async def submit(self) -> None:
        """Hand every prompt to the desk. Raises what Desk.submit raises."""
        try:
            for number, prompt in enumerate(self._ask.prompts):
                request_id = f"{self.response_id}-{number}"
                stream = await self._desk.submit(self._ask.model, prompt, self._ask.params, request_id)
                self._streams.append(stream)
        except BaseException:
            await self.aclose()
            raise

    async def __aiter__(self) -> AsyncIterator[tuple[int, Delta]]:
        n = self._ask.params.n
        self._merged = _merged(self._streams)
        async for number, delta in self._merged:
            self._output_tokens += len(delta.token_ids)
            yield number * n + delta.index, delta

    def usage(self) -> dict[str, object]:
        """OpenAI's usage object for what was generated so far."""
        prompt_tokens = sum(map(len, self._ask.prompts))
        output_tokens = 0 if self._ask.silent else self._output_tokens
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": output_tokens,
            "total_tokens": prompt_tokens + output_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(s.cached_tokens for s in self._streams)},
        }

    async def aclose(self) -> None:
        """Abort what still runs."""
        if self._merged is not None:
            await self._merged.aclose()
        for stream in self._streams:
            await stream.aclose()


def joined(deltas: Sequence[Delta]) -> Delta:
    """One sequence's Deltas, all of them, as one."""
    last = deltas[-1]
    return Delta(
        index=last.index,
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(chain.from_iterable(delta.token_ids for delta in deltas)),
        logprobs=tuple(chain.from_iterable(delta.logprobs for delta in deltas)),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        prompt_logprobs=deltas[0].prompt_logprobs,
    )


async def _merged(streams: Sequence[DeltaStream]) -> AsyncGenerator[tuple[int, Delta], None]:
    """(stream number, Delta) of all streams as they come; the first error ends them all."""
    if len(streams) == 1:
        async for delta in streams[0]:
            yield 0, delta
        return
    arrived: asyncio.Queue[tuple[int, Delta] | int] = asyncio.Queue()

    async def forward(number: int) -> None:
        try:
            async for delta in streams[number]:
                arrived.put_nowait((number, delta))
        finally:
            arrived.put_nowait(number)

    tasks = [asyncio.create_task(forward(number)) for number in range(len(streams))]
    try:
        running = len(tasks)
        while running:
            item = await arrived.get()
            if isinstance(item, int):
                running -= 1
                await tasks[item]
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
