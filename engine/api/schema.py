"""Declare OpenAI's request bodies as msgspec structs, and decode them strictly. Null means "not given" everywhere.

Every field that is implemented stands here; `engine.api.neutral` has those that are not. A field that is in
neither is refused. Nothing is accepted and then ignored.
"""

import re
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from engine.api.errors import ApiError, refused
from engine.api.json_size import check_json_size
from engine.api.neutral import (
    ADAPTER_NEUTRAL,
    NEUTRAL,
    SAMPLING_NEUTRAL,
    TOKENS_NEUTRAL,
    asks_for_nothing,
    remedy,
)
from engine.api.tools.chat_messages import Label, Message
from engine.api.tools.tool_fields import Tool, ToolChoice
from engine.structured.wire_forms import ResponseFormat, StructuredOutputs
from scheduler.request import MAX_PRIORITY, MOST_SALT_CHARS, LogprobsMode

Int = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
Priority = Annotated[int, msgspec.Meta(ge=0, le=MAX_PRIORITY)]
TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Prompt = str | list[str | TokenId | list[TokenId]]
_ID_CHARS = "[A-Za-z0-9._:/+=@-]"
RequestId = Annotated[str, msgspec.Meta(max_length=128, pattern=f"^{_ID_CHARS}+$")]
CacheSalt = Annotated[str, msgspec.Meta(min_length=1, max_length=MOST_SALT_CHARS)]
Biases = Annotated[
    dict[str, Any], msgspec.Meta(extra_json_schema={"additionalProperties": {"type": "number"}})
]

_PLACE = re.compile(r" - at (?:`key` in )?`\$\.?(.*?)`$")
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`")
_NOT_EMPTY = re.compile(r"Expected `\w+` of length <= 0")
_LONE_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_REMEDIES: Mapping[str, str] = {
    "role": "give system, developer, user, assistant or tool",
    "logprobs_mode": "give raw_logprobs or processed_logprobs",
    "type": "give text; other kinds of parts are not supported",
}
"""What to say of a value that none of a field's words is."""


class StreamOptions(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """How a stream is to be written; obfuscation is not implemented."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Sampling(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """How tokens are drawn and when an answer ends; the second group is the common extension of OpenAI's."""

    max_tokens: Int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: Int | None = None
    seed: Int | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Biases | None = None

    top_k: Int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: Int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[TokenId] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: Int | None = None
    structured_outputs: StructuredOutputs | None = None
    logprobs_mode: LogprobsMode | None = None


class Generate(Sampling, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What completions and chat completions share."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    response_format: ResponseFormat | None = None
    lora_path: str | list[str | None] | None = None
    request_id: RequestId | None = None
    priority: Priority | None = None
    cache_salt: CacheSalt | None = None

    # Labels for the client's own use.
    user: Label | None = None
    metadata: dict[Label, Label] | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None


class Completion(Generate, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """POST /v1/completions."""

    prompt: Prompt
    echo: bool | None = None
    logprobs: Int | bool | None = None
    best_of: Int | None = None
    add_special_tokens: bool | None = None


class Chat(Generate, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], msgspec.Meta(min_length=1)]
    max_completion_tokens: Int | None = None
    logprobs: bool | None = None
    top_logprobs: Int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None


class TokenSampling(Sampling, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """The `sampling_params` of POST /inference/v1/generate, as vLLM names them."""

    logprobs: Int | None = None


class TokenGenerate(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """POST /inference/v1/generate: token ids in, token ids out. Without `model` the base answers."""

    token_ids: Annotated[list[TokenId], msgspec.Meta(min_length=1)]
    sampling_params: TokenSampling
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    request_id: RequestId | None = None
    priority: Priority | None = None
    cache_salt: CacheSalt | None = None


class Tokenize(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """POST /tokenize: a prompt or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None
    tools: list[Tool] | None = None


class Detokenize(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """POST /detokenize."""

    tokens: list[TokenId]
    model: str | None = None


class LoadAdapter(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """POST /v1/load_lora_adapter. `lora_int_id` is a label."""

    lora_name: str
    lora_path: str
    load_inplace: bool | None = None
    base_model_name: str | None = None
    lora_int_id: Int | None = None


class UnloadAdapter(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """POST /v1/unload_lora_adapter. `lora_int_id` is a label."""

    lora_name: str
    lora_int_id: Int | None = None


Body = TypeVar("Body", bound=msgspec.Struct)


_TABLES: Mapping[type[msgspec.Struct], Mapping[str, tuple[object, ...]]] = {
    Completion: NEUTRAL,
    Chat: NEUTRAL,
    TokenGenerate: TOKENS_NEUTRAL,
    TokenSampling: SAMPLING_NEUTRAL,
    Tokenize: NEUTRAL,
    Detokenize: NEUTRAL,
    LoadAdapter: ADAPTER_NEUTRAL,
}
_WITHIN: Mapping[type[msgspec.Struct], Mapping[str, type[msgspec.Struct]]] = {
    TokenGenerate: {"sampling_params": TokenSampling},
}


def is_request_id(text: str) -> bool:
    """Tell whether a client's id of a request may stand in logs, headers and responses."""
    return re.fullmatch(f"{_ID_CHARS}{{1,128}}", text, re.ASCII) is not None


def neutral_of(kind: type[msgspec.Struct]) -> dict[str, tuple[object, ...]]:
    """Return the fields that a body may have though they are not implemented, with what they may hold."""
    table = _TABLES.get(kind, {})
    return {name: values for name, values in table.items() if name not in kind.__struct_fields__}


def within(kind: type[msgspec.Struct]) -> Mapping[str, type[msgspec.Struct]]:
    """Return the fields of a body that hold objects with a table of such fields of their own."""
    return _WITHIN.get(kind, {})


@cache
def _with_neutral(kind: type[msgspec.Struct]) -> type[msgspec.Struct]:
    """Make the type of bodies that may hold `neutral_of(kind)` beside the fields of `kind`."""
    fields: list[Any] = [(name, _with_neutral(inner)) for name, inner in within(kind).items()]
    fields += [(name, Any, None) for name in neutral_of(kind)]
    return msgspec.defstruct(  # pyright: ignore[reportReturnType] - made of `kind`, which its type does not say
        kind.__name__, fields, bases=(kind,), kw_only=True, frozen=True, forbid_unknown_fields=True
    )


WIRE: Mapping[type[msgspec.Struct], type[msgspec.Struct]] = {kind: _with_neutral(kind) for kind in _TABLES}
"""For each kind of body, the type that is decoded."""


def decoded(body: bytes, kind: type[Body], what: str = "the request body") -> Body:
    """Decode a body as `kind`; messages call it `what`. Raises ApiError (400) that names the field at fault."""
    check_json_size(body, what)
    wire: Any = WIRE.get(kind, kind)
    try:
        value: Any = msgspec.json.decode(body.removeprefix(_BYTE_ORDER_MARK), type=wire)
    except msgspec.ValidationError as error:
        raise _field_error(str(error), what) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        surrogate = "; it may have half of a surrogate pair" if _LONE_SURROGATE.search(body) else ""
        raise ApiError(400, f"{what} is not JSON: {error}{surrogate}", None, "invalid_json") from None
    except RecursionError:
        raise ApiError(400, f"{what} is nested too deeply", None, "invalid_json") from None
    _check_neutral(value, kind)
    return value


def _check_neutral(value: msgspec.Struct, kind: type[msgspec.Struct], place: str = "") -> None:
    """Refuse what asks for what is not implemented, in a body of `kind` and in the objects that it holds."""
    for field, neutral in neutral_of(kind).items():
        if not asks_for_nothing(getattr(value, field), neutral):
            raise refused(_joined(place, field), remedy(field), "unsupported_value")
    for field, inner in within(kind).items():
        _check_neutral(getattr(value, field), inner, _joined(place, field))


def converted(value: object, kind: type[Body]) -> Body:
    """Make a body of `kind` of a dictionary. Raises ApiError (400) that names the field at fault."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise _field_error(str(error), "the request") from None


def _field_error(text: str, what: str) -> ApiError:
    """Express msgspec's message with the field in front and as `param`."""
    place = _PLACE.search(text)
    path, reason = (place[1], text[: place.start()]) if place else ("", text)
    if unknown := _UNKNOWN.fullmatch(reason):
        return refused(_joined(path, unknown[1]), "no such field: leave it out", "unknown_field")
    if missing := _MISSING.fullmatch(reason):
        return refused(_joined(path, missing[1]), "the field is required", "missing_field")
    if _NOT_EMPTY.fullmatch(reason):
        return refused(path, remedy(path), "unsupported_value")
    if reason.startswith("Invalid enum value"):
        reason += ": " + _REMEDIES.get(path.rpartition(".")[2], "leave the field out")
    reason = reason[:1].lower() + reason[1:].replace("`", "").replace(" | null", "")
    if not path:
        return ApiError(400, f"{what}: {reason}", None, "invalid_type")
    return refused(path, reason, "invalid_type")


def _joined(path: str, field: str) -> str:
    return f"{path}.{field}" if path else field
