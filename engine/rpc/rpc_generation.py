"""Run one gRPC request on the engine, and free what it held however the call ends."""

import time
from collections.abc import AsyncIterator

from engine.api.base import EngineClient, OutputStream
from engine.api.errors import ApiError
from engine.api.parsing import GenerateRequest
from engine.output import Delta
from scheduler.limits import RequestRefused


class RpcGeneration:
    """One request's output. Use as `async with`: entering submits it, leaving aborts what still runs."""

    def __init__(self, client: EngineClient, request: GenerateRequest, engine_id: str) -> None:
        """Submit nothing yet; `engine_id` is unique, as a client's own id may not be."""
        self._client, self._request, self._engine_id = client, request, engine_id
        self._stream: OutputStream | None = None
        self.output_tokens = 0
        self.first_token_at_s: float | None = None

    @property
    def prompt(self) -> tuple[int, ...]:
        """Return the prompt's token ids."""
        return self._request.prompts[0]

    @property
    def prompt_tokens(self) -> int:
        """Count the prompt's tokens."""
        return len(self.prompt)

    async def __aenter__(self) -> "RpcGeneration":
        """Submit the request. Raises what EngineClient.submit_all raises, or ApiError for its RequestRefused."""
        request, prompts = self._request, {self._engine_id: self.prompt}
        try:
            (self._stream,) = await self._client.submit_all(request.model, prompts, request.params)
        except RequestRefused as error:
            raise ApiError(400, str(error), "prompt", "context_length_exceeded") from None
        return self

    async def __aexit__(self, *failure: object) -> None:
        if self._stream is not None:
            await self._stream.aclose()

    async def deltas(self) -> AsyncIterator[Delta]:
        """Yield the Deltas of all sequences as they come."""
        assert self._stream is not None, "entering submits"
        async for delta in self._stream:
            if self.first_token_at_s is None:
                self.first_token_at_s = time.monotonic()
            self.output_tokens += len(delta.token_ids)
            yield delta
