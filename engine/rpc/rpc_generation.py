"""Run one gRPC request on the engine, and free what it held however the call ends."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

from engine.api.base import EngineClient, OutputStream
from engine.api.errors import ApiError
from engine.api.parsing import GenerateRequest
from engine.catalogue.base import VERSION_CHARS
from engine.output import Delta
from scheduler.limits import RequestRefused
from scheduler.plan import FinishReason
from scheduler.request import Origin


class RpcGeneration:
    """One request's output. Use as `async with`: leaving aborts what still runs."""

    def __init__(self, client: EngineClient, engine_id: str) -> None:
        """Submit nothing yet; `engine_id` is unique, as a client's own id may not be."""
        self._client, self._engine_id = client, engine_id
        self._submitting: asyncio.Future[Sequence[OutputStream]] | None = None
        self._stream: OutputStream | None = None
        self._running: set[int] = set()
        self._aborted = False
        self.prompt: tuple[int, ...] = ()
        self.output_tokens = 0
        self.first_token_at_s: float | None = None

    @property
    def prompt_tokens(self) -> int:
        """Count the prompt's tokens."""
        return len(self.prompt)

    @property
    def version(self) -> str | None:
        """The version of the adapter that answers, as HTTP's `system_fingerprint`; None for the base model."""
        return None if self._stream is None else self._stream.adapter_digest[:VERSION_CHARS] or None

    async def __aenter__(self) -> "RpcGeneration":
        return self

    async def __aexit__(self, *failure: object) -> None:
        if self._stream is not None:
            await self._stream.aclose()

    async def submit(self, request: GenerateRequest, origin: Origin) -> None:
        """Submit a request of one prompt.

        Raises what EngineClient.submit_all raises, or ApiError for its RequestRefused.
        """
        (self.prompt,) = request.prompts
        self._running.update(range(request.params.n))
        if self._aborted:
            return
        prompts = {self._engine_id: self.prompt}
        work = self._client.submit_all(request.model, prompts, request.params, origin)
        self._submitting = asyncio.ensure_future(work)
        try:
            (self._stream,) = await self._submitting
        except RequestRefused as error:
            raise ApiError(400, str(error), "prompt", "context_length_exceeded") from None
        except asyncio.CancelledError:
            if not self._aborted:
                raise
        if self._aborted and self._stream is not None:
            await self._stream.aclose()

    async def abort(self) -> None:
        """Free what the request holds; each sequence that has not ended ends as aborted."""
        self._aborted = True
        if self._stream is not None:
            await self._stream.aclose()
        elif self._submitting is not None:
            self._submitting.cancel()

    async def deltas(self) -> AsyncIterator[Delta]:
        """Yield the Deltas of all sequences as they come."""
        if self._stream is not None:
            async for delta in self._stream:
                if self.first_token_at_s is None:
                    self.first_token_at_s = time.monotonic()
                self.output_tokens += len(delta.token_ids)
                if delta.finish_reason is not None:
                    self._running.discard(delta.index)
                yield delta
        for index in sorted(self._running):
            yield Delta(index, "", finish_reason=FinishReason.ABORT)
