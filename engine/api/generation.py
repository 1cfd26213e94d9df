"""Generate the response to one GenerateRequest: all its prompts at once, whole or in chunks.

ENDPOINTS are OpenAI's two ways to ask for text, and vLLM's to ask for token ids. Each has its way to read a body and
to write a response.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from engine.api.base import ChoiceWriter, EngineClient, OutputStream
from engine.api.bodies.body_readers import GENERATING
from engine.api.errors import ApiError
from engine.api.parsing import GenerateRequest, ServedModels
from engine.api.tokens.token_parsing import SAMPLING
from engine.api.tokens.token_writer import TokenWriter
from engine.api.writers import ChatWriter, CompletionWriter
from engine.catalogue.base import VERSION_CHARS
from engine.output import Delta, join_deltas
from engine.tokenizer import Tokenizer
from engine.waiting.task_pool import TaskPool
from scheduler.limits import RequestRefused
from scheduler.request import NOWHERE, InvalidParameter, Origin

INLINE_TOKENS = 256  # what tells of more of them is written in a thread


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One way to ask: `read` parses a body, `writer` makes what writes the response to it.

    Response ids stand in `id_field` and begin with `prefix`, unless vLLM's `request_id` tells the client's own.
    `prompt_field` is the body's field that holds what is to be continued; `sampling` is what the names of the fields
    that say how tokens are drawn begin with.
    """

    prefix: str
    prompt_field: str
    read: Callable[[bytes, ServedModels], GenerateRequest]
    writer: Callable[[GenerateRequest, Tokenizer], ChoiceWriter]
    id_field: str = "id"
    sampling: str = ""

    def response_id(self, engine_id: str, own: str | None) -> str:
        """Return the id that a response tells, where the client gave its `own` or none."""
        if own is None:
            return engine_id
        return f"{self.prefix}-{own}" if self.id_field == "id" else own


ENDPOINTS: Mapping[str, Endpoint] = {
    "/v1/completions": Endpoint("cmpl", "prompt", GENERATING["/v1/completions"], CompletionWriter),
    "/v1/chat/completions": Endpoint("chatcmpl", "messages", GENERATING["/v1/chat/completions"], ChatWriter),
    "/inference/v1/generate": Endpoint(
        "generate-tokens",
        "token_ids",
        GENERATING["/inference/v1/generate"],
        TokenWriter,
        "request_id",
        SAMPLING,
    ),
}


class Generation:
    """One response, whole or in chunks. Use as `async with`, and ask for one of the two once.

    Entering submits every prompt, or raises and leaves none behind. Leaving aborts what still runs. All is answered by
    one content of the adapter, which the response tells as OpenAI's `system_fingerprint`.
    Choices count over the prompts and then over `n`.
    """

    def __init__(
        self, endpoint: Endpoint, client: EngineClient, request: GenerateRequest, pool: TaskPool | None = None,
        origin: Origin = NOWHERE,
    ) -> None:  # fmt: skip
        """Write what is large in `pool`, if one is given."""
        priority = origin.priority + request.priority
        self._origin = replace(origin, priority=priority, cache_salt=request.cache_salt)
        self._pool = pool
        self._client, self._request = client, request
        self._prompt_field, self._sampling = endpoint.prompt_field, endpoint.sampling
        self._writer = endpoint.writer(request, client.tokenizer)
        self._engine_id = f"{endpoint.prefix}-{uuid.uuid4().hex}"  # unique, as a client's own may not be
        response_id = endpoint.response_id(self._engine_id, request.request_id)
        self._head: dict[str, object] = {endpoint.id_field: response_id, "created": int(time.time())}
        self._head["model"] = request.model
        self._streams: Sequence[OutputStream] = ()
        self._merged: AsyncGenerator[tuple[int, Delta], None] | None = None
        self._by_choice: dict[int, list[Delta]] = {}
        self._output_tokens = 0
        self.first_token_at_s: float | None = None

    @property
    def prompt_tokens(self) -> int:
        """Count the tokens of all prompts."""
        return sum(map(len, self._request.prompts))

    @property
    def output_tokens(self) -> int:
        """Count the tokens of what was generated so far."""
        return 0 if self._request.echo_only else self._output_tokens

    async def __aenter__(self) -> "Generation":
        """Submit every prompt. Raises what EngineClient.submit raises, or ApiError for its RequestRefused."""
        request = self._request
        prompts = {f"{self._engine_id}-{number}": prompt for number, prompt in enumerate(request.prompts)}
        try:
            self._streams = await self._client.submit_all(
                request.model, prompts, request.params, self._origin
            )
        except RequestRefused as error:
            raise ApiError(400, str(error), self._prompt_field, "context_length_exceeded") from None
        except InvalidParameter as error:
            raise self._in_the_client_s_words(error) from None
        self._head["system_fingerprint"] = self._streams[0].adapter_digest[:VERSION_CHARS] or None
        return self

    def _in_the_client_s_words(self, error: InvalidParameter) -> InvalidParameter:
        if error.field == "prompt":
            return self._unknown_token(error)
        return InvalidParameter(self._sampling + error.field, error.value, error.remedy)

    def _unknown_token(self, error: InvalidParameter) -> InvalidParameter:
        """Say in the client's words that the tokenizer has a token that the model has not."""
        token_id = error.value
        text = self._client.tokenizer.token_text(token_id) if isinstance(token_id, int) else ""
        remedy = f"the model lacks the token {text!r}, leave it out of the text ({error.remedy})"
        return InvalidParameter(self._prompt_field, token_id, remedy)

    async def __aexit__(self, *failure: object) -> None:
        if self._merged is not None:
            await self._merged.aclose()
        for stream in self._streams:
            await stream.aclose()

    async def whole(self) -> dict[str, object]:
        """Return the response object, when everything is generated."""
        await self.finish()
        return self.response()

    async def finish(self) -> int:
        """Wait until everything is generated; return how many tokens the response tells something of."""
        tokens = 0
        async for choice, delta in self._deltas():
            self._by_choice.setdefault(choice, []).append(delta)
            tokens += len(delta.token_ids) + len(delta.prompt_logprobs)
        return tokens

    def response(self) -> dict[str, object]:
        """Write the response object, after `finish`. Any thread may."""
        found = self._by_choice
        deltas = {choice: join_deltas(found[choice]) for choice in sorted(found)}
        choices = [self._writer.whole(choice, delta) for choice, delta in deltas.items()]
        beside = self._writer.beside(deltas[0])
        return self._object(self._writer.whole_object, choices) | beside | {"usage": self._usage()}

    async def chunks(self) -> AsyncIterator[dict[str, object]]:
        """Yield the chunk objects of a stream, as they come.

        The first ones come with the first Delta, so that what fails until then is still answered with a status.
        """
        opens = True
        async for choice, delta in self._deltas():
            write = partial(self._written, choice, delta, opens)
            opens = False
            large = len(delta.prompt_logprobs) > INLINE_TOKENS
            for chunk in await self._pool.run(write) if large and self._pool else write():
                yield chunk
        if self._request.form.include_usage:
            yield self._object(self._writer.chunk_object, []) | {"usage": self._usage()}

    def _written(self, choice: int, delta: Delta, opens: bool) -> list[dict[str, object]]:
        """Write the chunks of one Delta, which may be the first. Any thread may."""
        chunks: list[dict[str, object]] = []
        if opens:
            found = self._writer.beside(delta).items()
            beside = {name: value for name, value in found if value is not None}
            chunks += [self._chunk(entry) for entry in self._writer.opening()]
            chunks[:1] = [chunk | beside for chunk in chunks[:1]]
        if (entry := self._writer.part(choice, delta)) is not None:
            chunks.append(self._chunk(entry))
        return chunks

    async def _deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """Yield (choice, Delta) of all prompts as they come."""
        self._merged = _merge(self._streams)
        async for number, delta in self._merged:
            if self.first_token_at_s is None:
                self.first_token_at_s = time.monotonic()
            self._output_tokens += len(delta.token_ids)
            yield number * self._request.params.n + delta.index, delta

    def _chunk(self, entry: dict[str, object]) -> dict[str, object]:
        form, usage = self._request.form, dict[str, object]()
        if form.include_usage or form.continuous_usage:
            usage = {"usage": self._usage() if form.continuous_usage else None}
        return self._object(self._writer.chunk_object, [entry]) | usage

    def _object(self, kind: str | None, choices: list[dict[str, object]]) -> dict[str, object]:
        return self._head | ({} if kind is None else {"object": kind}) | {"choices": choices}

    def _usage(self) -> dict[str, object]:
        """Write OpenAI's usage object for what was generated so far."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.output_tokens,
            "total_tokens": self.prompt_tokens + self.output_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(s.cached_tokens for s in self._streams)},
        }


async def _merge(streams: Sequence[OutputStream]) -> AsyncGenerator[tuple[int, Delta], None]:
    """Yield (stream number, Delta) of all streams as they come; the first error ends them all."""
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
