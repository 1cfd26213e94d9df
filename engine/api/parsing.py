"""Turn OpenAI request bodies into GenerateRequests, checked against the model that will answer.

It may not know HTTP: the server and the batch runner both come through here.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from msgspec import structs

from engine.api import schema
from engine.api.errors import ApiError, refused
from engine.api.tools.chat_messages import chat_messages
from engine.api.tools.tool_fields import ToolUse, asked_tools, offered
from engine.errors import UnknownModel
from engine.structured.wire_forms import asked_form
from engine.tokenizer import PromptTooLong, Tokenizer
from scheduler.request import InvalidParameter, SamplingParams, check_token_ids

COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens for completions
MAX_PROMPTS = 2048
_TOKEN_ID = re.compile(r"-?[0-9]{1,18}", re.ASCII)

# Fields that are the same on the wire and in SamplingParams; null leaves SamplingParams' default.
_SAME = (
    *("n", "temperature", "top_p", "min_p", "seed", "presence_penalty", "frequency_penalty"),
    *("repetition_penalty", "min_tokens", "ignore_eos", "prompt_logprobs"),
    *("skip_special_tokens", "include_stop_str_in_output", "logprobs_mode"),
)


class ServedModels(Protocol):
    """The base model and the adapters, as whoever reads requests sees them."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The base model's tokenizer and chat template."""
        ...

    def tokenizer_of(self, model: str) -> Tokenizer:
        """Return the tokenizer of a model, with its own chat template. Not for the event loop: it may wait.

        Raises UnknownModel, or what an adapter's reader refuses with; NotFetched for one that `find` has to fetch.
        """
        ...

    @property
    def model_name(self) -> str:
        """The name that responses call the base model by."""
        ...

    @property
    def max_model_len(self) -> int:
        """Most tokens of a prompt and its output together."""
        ...

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        ...

    def may_serve(self, model: str) -> bool:
        """Return False if `model` is neither the base nor an adapter; True also for what a peer may have."""
        ...


class FetchedModels(ServedModels, Protocol):
    """The same, some of which are to be fetched before they can be read for."""

    async def find(self, model: str) -> None:
        """Have what `model` means fetched, if it is to be fetched from its source. Raises as `tokenizer_of`."""
        ...


@dataclass(frozen=True, slots=True)
class ResponseForm:
    """How a client wants the response to be written.

    With `continuous_usage` every chunk of a stream tells the usage so far. `token_ids` adds the ids of prompts
    and choices; with `tokens_as_ids` tokens are named by their id, as `token_id:5`.
    """

    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    token_ids: bool = False
    tokens_as_ids: bool = False


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """What a client wants generated: `prompts` (token ids), each continued `params.n` times.

    `echo` is the text of each prompt if the response is to begin with it, else empty. `echo_only` asks for
    the echo alone (max_tokens=0): the one token that the engine draws to get there is not shown.
    `wants_prompt_logprobs` is true if the client asked for them, and not only its echo needs them.
    `request_id` is the client's own name of the response, if it gave one. `tools` says how the answer may call tools.
    What has the lower `priority` goes first, of what waits. K/V are shared only with requests of the same `cache_salt`.
    """

    model: str
    prompts: tuple[tuple[int, ...], ...]
    params: SamplingParams
    form: ResponseForm = ResponseForm()
    echo: tuple[str, ...] = ()
    echo_only: bool = False
    wants_prompt_logprobs: bool = False
    request_id: str | None = None
    tools: ToolUse | None = None
    priority: int = 0
    cache_salt: str = ""


def completion_request(body: bytes, client: ServedModels) -> GenerateRequest:
    """Parse a body of POST /v1/completions. Raises ApiError, UnknownModel or InvalidParameter."""
    return from_completion(schema.decoded(body, schema.Completion), client)


def chat_request(body: bytes, client: ServedModels) -> GenerateRequest:
    """Parse a chat's body. Raises ApiError, UnknownModel, InvalidChat or InvalidParameter."""
    return from_chat(schema.decoded(body, schema.Chat), client)


def from_completion(wire: schema.Completion, client: ServedModels) -> GenerateRequest:
    """Check a completion against the model that will answer. Raises ApiError, UnknownModel or InvalidParameter."""
    _check_names(wire, client)
    if wire.best_of is not None and wire.best_of != (wire.n or 1):
        raise refused("best_of", "only best_of=n is supported: leave it out", "unsupported_value")
    echo, echo_only = bool(wire.echo), wire.max_tokens == 0
    if echo_only and not echo:
        raise refused("max_tokens", "0 is of use with echo=true only: give at least 1", "invalid_value")
    max_tokens = COMPLETION_TOKENS if wire.max_tokens is None else wire.max_tokens or 1
    logprobs = None if wire.logprobs is False or wire.logprobs is None else int(wire.logprobs)
    fields: dict[str, Any] = {"max_tokens": max_tokens, "logprobs": logprobs}
    if echo and logprobs is not None:
        fields["prompt_logprobs"] = max(logprobs, wire.prompt_logprobs or 0)
    params = sampling_params(wire, fields, client.vocab_size)
    prompts = _prompt_ids(wire.prompt, client, wire.add_special_tokens is not False)
    check_token_ids("prompt", [token_id for ids in prompts for token_id in ids], client.vocab_size)
    return GenerateRequest(
        model=wire.model,
        prompts=prompts,
        params=params,
        form=response_form(wire),
        echo=_echo_texts(wire.prompt, prompts, client.tokenizer) if echo else (),
        echo_only=echo_only,
        wants_prompt_logprobs=wire.prompt_logprobs is not None,
        request_id=wire.request_id,
        priority=wire.priority or 0,
        cache_salt=wire.cache_salt or "",
    )


def from_chat(wire: schema.Chat, client: ServedModels) -> GenerateRequest:
    """Check a chat completion against the model that will answer. Raises as `chat_request`."""
    _check_names(wire, client)
    if wire.top_logprobs is not None and not wire.logprobs:
        raise refused("top_logprobs", "it needs logprobs=true: set that, or leave it out", "invalid_value")
    if wire.max_tokens is not None and wire.max_completion_tokens not in (None, wire.max_tokens):
        message = "it differs from max_completion_tokens: give one of them"
        raise refused("max_tokens", message, "invalid_value")
    max_tokens = wire.max_tokens if wire.max_completion_tokens is None else wire.max_completion_tokens
    logprobs = (wire.top_logprobs or 0) if wire.logprobs else None
    try:
        params = sampling_params(wire, {"max_tokens": max_tokens, "logprobs": logprobs}, client.vocab_size)
    except InvalidParameter as error:
        raise _renamed(error, wire) from None
    tokenizer = client.tokenizer_of(wire.model)
    parallel = wire.parallel_tool_calls is not False
    tools, params = asked_tools(params, wire.tools, wire.tool_choice, parallel, tokenizer.tool_syntax)
    told = offered(wire.tools, wire.tool_choice)
    prompt = chat_ids(wire, chat_messages(wire.messages), tokenizer, client.max_model_len, told)
    return GenerateRequest(
        model=wire.model,
        prompts=(prompt,),
        params=params,
        form=response_form(wire),
        wants_prompt_logprobs=params.prompt_logprobs is not None,
        request_id=wire.request_id,
        priority=wire.priority or 0,
        tools=tools,
        cache_salt=wire.cache_salt or "",
    )


def chat_ids(
    wire: schema.Chat | schema.Tokenize,
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    most_tokens: int | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[int, ...]:
    """Put a body's conversation through the chat template. Raises InvalidChat, PromptTooLong or ApiError."""
    continues = bool(wire.continue_final_message)
    if continues and wire.add_generation_prompt:
        message = "it excludes add_generation_prompt=true: give one of them"
        raise refused("continue_final_message", message, "invalid_value")
    begins_answer = wire.add_generation_prompt is not False and not continues
    return tokenizer.encode_chat(messages, begins_answer, continues, most_tokens, tools=tools)


def check_model(name: str, client: ServedModels) -> None:
    """Raise UnknownModel unless `name` is the base model or an adapter, as far as is known without asking peers."""
    if not client.may_serve(name):
        raise UnknownModel(name)


def _check_names(wire: schema.Generate, client: ServedModels) -> None:
    """Refuse unknown models and, in SGLang's field for adapters, another than `model`."""
    check_model(wire.model, client)
    paths = wire.lora_path if isinstance(wire.lora_path, list) else [wire.lora_path]
    if any(path is not None and path != wire.model for path in paths):
        message = "it differs from model: name the adapter in model, and leave this field out"
        raise refused("lora_path", message, "unsupported_value")


def _prompt_ids(
    prompt: schema.Prompt, client: ServedModels, add_special: bool
) -> tuple[tuple[int, ...], ...]:
    """Return every prompt's token ids; the field is a text, a list of texts, token ids, or a list of those."""
    items = [prompt] if isinstance(prompt, str) else prompt
    texts = [item for item in items if isinstance(item, str)]
    flat = [item for item in items if isinstance(item, int)]
    lists = [item for item in items if isinstance(item, list)]
    if not items:
        raise refused("prompt", "the list is empty: give at least one prompt", "invalid_value")
    if len(items) not in (len(texts), len(flat), len(lists)):
        raise refused("prompt", "give a text, token ids, or a list of either", "invalid_type")
    if len(texts) + len(lists) > MAX_PROMPTS:
        message = f"it has {len(items)} prompts: give at most {MAX_PROMPTS}"
        raise refused("prompt", message, "too_many_prompts")
    longest = client.max_model_len
    for ids in (*lists, flat):
        if len(ids) > longest:
            raise PromptTooLong("prompt", len(ids), "tokens", longest, longest)
    encoded = (client.tokenizer.encode(text, add_special, most_tokens=longest) for text in texts)
    prompts = (*encoded, *map(tuple, lists), *([tuple(flat)] if flat else []))
    if not all(prompts):
        raise refused("prompt", "a prompt has no tokens: give at least one", "invalid_value")
    return prompts


def _echo_texts(
    prompt: schema.Prompt, prompts: Sequence[Sequence[int]], tokenizer: Tokenizer
) -> tuple[str, ...]:
    """Return the prompts as text: as they were given, or decoded."""
    items = [prompt] if isinstance(prompt, str) else prompt
    texts = tuple(item for item in items if isinstance(item, str))
    return texts or tuple(tokenizer.decode(token_ids) for token_ids in prompts)


def sampling_params(wire: schema.Sampling, fields: dict[str, Any], vocab_size: int) -> SamplingParams:
    """Make SamplingParams of the shared fields and `fields`, whose entries win. Raises InvalidParameter."""
    given = structs.asdict(wire)
    same = {name: given[name] for name in _SAME if given[name] is not None}
    params = SamplingParams(
        **(same | fields),
        top_k=0 if wire.top_k in (None, -1) else wire.top_k,  # -1 is off, too, in some clients
        stop=(wire.stop,) if isinstance(wire.stop, str) else tuple(wire.stop or ()),
        logit_bias=tuple(sorted(_biases(wire.logit_bias or {}).items())),
        stop_token_ids=tuple(wire.stop_token_ids or ()),
        structured_outputs=asked_form(given.get("response_format"), wire.structured_outputs),
    )
    check_token_ids("logit_bias", [token_id for token_id, _ in params.logit_bias], vocab_size)
    check_token_ids("stop_token_ids", params.stop_token_ids, vocab_size)
    return params


def _biases(given: Mapping[str, Any]) -> dict[int, float]:
    """Read the keys of `logit_bias` as token ids. Raises InvalidParameter that shows the entry at fault."""
    for key, value in given.items():
        if not _TOKEN_ID.fullmatch(key) or isinstance(value, bool) or not isinstance(value, int | float):
            remedy = "give an object with token ids as keys, and numbers from -100 to 100"
            raise InvalidParameter("logit_bias", {key: value}, remedy)
    return {int(key): value for key, value in given.items()}


def response_form(wire: schema.Generate | schema.TokenGenerate) -> ResponseForm:
    """Read how the response is to be written."""
    options, stream = wire.stream_options or schema.StreamOptions(), bool(wire.stream)
    include_usage, continuous = bool(options.include_usage), bool(options.continuous_usage_stats)
    if (include_usage or continuous) and not stream:
        raise refused("stream_options", "it needs stream=true: set that, or leave it out", "invalid_value")
    return ResponseForm(
        stream=stream,
        include_usage=include_usage,
        continuous_usage=continuous,
        token_ids=isinstance(wire, schema.TokenGenerate) or bool(wire.return_token_ids),
        tokens_as_ids=isinstance(wire, schema.TokenGenerate) or bool(wire.return_tokens_as_token_ids),
    )


def _renamed(error: InvalidParameter, wire: schema.Chat) -> ApiError | InvalidParameter:
    """Name the field of the error as the chat client did."""
    names = {"logprobs": "top_logprobs"}
    if wire.max_completion_tokens is not None:
        names["max_tokens"] = "max_completion_tokens"
    return InvalidParameter(names.get(error.field, error.field), error.value, error.remedy)
