"""Turn OpenAI request bodies into GenerateRequests, checked against the model that will answer.

It may not know HTTP: the server and the batch runner both come through here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from msgspec import structs

from engine.api import schema
from engine.api.base import EngineClient
from engine.api.errors import ApiError, refused
from engine.errors import UnknownModel
from engine.tokenizer import PromptTooLong, Tokenizer
from scheduler.request import InvalidParameter, SamplingParams, check_token_ids

COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens for completions
MOST_TRANSLATED = (
    1 << 20
)  # characters or token ids that /tokenize and /detokenize take, if no prompt may have more

# Fields that are the same on the wire and in SamplingParams; null leaves SamplingParams' default.
_SAME = (
    *("n", "temperature", "top_p", "min_p", "seed", "presence_penalty", "frequency_penalty"),
    *("repetition_penalty", "min_tokens", "ignore_eos", "prompt_logprobs"),
)


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """What a client wants generated: `prompts` (token ids), each continued `params.n` times.

    `echo` is the text of each prompt if the response is to begin with it, else empty. `echo_only` asks for
    the echo alone (max_tokens=0): the one token that the engine draws to get there is not shown.
    `wants_prompt_logprobs` is true if the client asked for them, and not only its echo needs them.
    """

    model: str
    prompts: tuple[tuple[int, ...], ...]
    params: SamplingParams
    stream: bool = False
    include_usage: bool = False
    echo: tuple[str, ...] = ()
    echo_only: bool = False
    wants_prompt_logprobs: bool = False


def completion_request(body: bytes, client: EngineClient) -> GenerateRequest:
    """Parse a body of POST /v1/completions. Raises ApiError, UnknownModel or InvalidParameter."""
    wire = schema.decoded(body, schema.Completion)
    check_model(wire.model, client)
    if wire.best_of is not None and wire.best_of != (wire.n or 1):
        raise refused("best_of", "only best_of=n is supported: leave it out", "unsupported_value")
    echo, echo_only = bool(wire.echo), wire.max_tokens == 0
    if echo_only and not echo:
        raise refused("max_tokens", "0 is of use with echo=true only: give at least 1", "invalid_value")
    prompts = _prompt_ids(wire.prompt, client)
    check_token_ids("prompt", [token_id for ids in prompts for token_id in ids], client.vocab_size)
    max_tokens = COMPLETION_TOKENS if wire.max_tokens is None else max(wire.max_tokens, int(echo_only))
    fields: dict[str, Any] = {"max_tokens": max_tokens, "logprobs": wire.logprobs}
    if echo and wire.logprobs is not None:
        fields["prompt_logprobs"] = max(wire.logprobs, wire.prompt_logprobs or 0)
    return GenerateRequest(
        model=wire.model,
        prompts=prompts,
        params=_params(wire, fields, client.vocab_size),
        stream=bool(wire.stream),
        include_usage=_include_usage(wire),
        echo=_echo_texts(wire.prompt, prompts, client.tokenizer) if echo else (),
        echo_only=echo_only,
        wants_prompt_logprobs=wire.prompt_logprobs is not None,
    )


def chat_request(body: bytes, client: EngineClient) -> GenerateRequest:
    """Parse a body of POST /v1/chat/completions.

    Raises ApiError, UnknownModel, InvalidChat or InvalidParameter.
    """
    wire = schema.decoded(body, schema.Chat)
    check_model(wire.model, client)
    if wire.top_logprobs is not None and not wire.logprobs:
        raise refused("top_logprobs", "it needs logprobs=true: set that, or leave it out", "invalid_value")
    if wire.max_tokens is not None and wire.max_completion_tokens not in (None, wire.max_tokens):
        raise refused(
            "max_tokens", "it differs from max_completion_tokens: give one of them", "invalid_value"
        )
    max_tokens = wire.max_tokens if wire.max_completion_tokens is None else wire.max_completion_tokens
    logprobs = (wire.top_logprobs or 0) if wire.logprobs else None
    try:
        params = _params(wire, {"max_tokens": max_tokens, "logprobs": logprobs}, client.vocab_size)
    except InvalidParameter as error:
        raise _renamed(error, wire) from None
    tokenizer = client.tokenizer_of(wire.model)
    prompt = tokenizer.encode_chat(chat_messages(wire.messages), most_tokens=client.max_model_len)
    return GenerateRequest(
        model=wire.model,
        prompts=(prompt,),
        params=params,
        stream=bool(wire.stream),
        include_usage=_include_usage(wire),
        wants_prompt_logprobs=params.prompt_logprobs is not None,
    )


def chat_messages(messages: Sequence[schema.Message]) -> list[dict[str, str]]:
    """Convert messages to what a chat template reads.

    `developer` is what OpenAI now calls `system`; text parts are joined by line breaks.
    """
    return [_template_message(message) for message in messages]


def check_model(name: str, client: EngineClient) -> None:
    """Raise UnknownModel unless `name` is the base model or an adapter, as far as is known without asking peers."""
    if not client.may_serve(name):
        raise UnknownModel(name)


def _template_message(message: schema.Message) -> dict[str, str]:
    role = "system" if message.role == "developer" else message.role
    content = message.content
    text = content if isinstance(content, str) else "\n".join(part.text for part in content)
    named = {"name": message.name} if message.name is not None else {}
    return {"role": role, "content": text} | named


def check_tokenized(field: str, amount: int, unit: str, client: EngineClient) -> None:
    """Raise ApiError for what is too long to be translated: beyond MOST_TRANSLATED, and beyond any prompt."""
    longest = client.max_model_len if unit == "tokens" else client.tokenizer.most_chars(client.max_model_len)
    if amount > (most := max(MOST_TRANSLATED, longest)):
        raise refused(field, f"it has {amount} {unit}, give at most {most}", "invalid_value")


def _prompt_ids(prompt: schema.Prompt, client: EngineClient) -> tuple[tuple[int, ...], ...]:
    """Return every prompt's token ids; the field is a text, a list of texts, token ids, or a list of those."""
    items = [prompt] if isinstance(prompt, str) else prompt
    texts = [item for item in items if isinstance(item, str)]
    flat = [item for item in items if isinstance(item, int)]
    lists = [item for item in items if isinstance(item, list)]
    if not items:
        raise refused("prompt", "the list is empty: give at least one prompt", "invalid_value")
    if len(items) not in (len(texts), len(flat), len(lists)):
        raise refused("prompt", "give a text, token ids, or a list of either", "invalid_type")
    longest = client.max_model_len
    for ids in (*lists, flat):
        if len(ids) > longest:
            raise PromptTooLong("prompt", len(ids), "tokens", longest, longest)
    encoded = (client.tokenizer.encode(text, most_tokens=longest) for text in texts)
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


def _params(wire: schema.Generate, fields: dict[str, Any], vocab_size: int) -> SamplingParams:
    """Make SamplingParams of the shared fields and `fields`, whose entries win. Raises InvalidParameter."""
    given = structs.asdict(wire)
    same = {name: given[name] for name in _SAME if given[name] is not None}
    stop = (wire.stop,) if isinstance(wire.stop, str) else tuple(wire.stop or ())
    bias = wire.logit_bias or {}
    check_token_ids("logit_bias", tuple(bias), vocab_size)
    check_token_ids("stop_token_ids", wire.stop_token_ids or (), vocab_size)
    return SamplingParams(
        **(same | fields),
        top_k=0 if wire.top_k in (None, -1) else wire.top_k,  # -1 is off, too, in some clients
        stop=stop,
        logit_bias=tuple(sorted(bias.items())),
        stop_token_ids=tuple(wire.stop_token_ids or ()),
    )


def _include_usage(wire: schema.Generate) -> bool:
    if wire.stream_options is None:
        return False
    if not wire.stream:
        raise refused("stream_options", "it needs stream=true: set that, or leave it out", "invalid_value")
    return bool(wire.stream_options.include_usage)


def _renamed(error: InvalidParameter, wire: schema.Chat) -> ApiError | InvalidParameter:
    """Name the field of the error as the chat client did."""
    names = {"logprobs": "top_logprobs"}
    if wire.max_completion_tokens is not None:
        names["max_tokens"] = "max_completion_tokens"
    return InvalidParameter(names.get(error.field, error.field), error.value, error.remedy)
