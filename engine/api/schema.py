"""Declare OpenAI's request bodies as msgspec structs, and decode them strictly. Null means "not given" everywhere.

Every field that a body may have stands here. Those of OpenAI that this server does not implement have the
values that change nothing (`NEUTRAL`). With any other value, and for fields that are not here, the request is
refused. Nothing is accepted and then ignored.
"""

import re
from typing import Annotated, Literal, TypeVar

import msgspec

from engine.api.errors import ApiError, refused

Int = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Prompt = str | list[str | TokenId | list[TokenId]]
Label = Annotated[str, msgspec.Meta(max_length=512)]

_PLACE = re.compile(r" - at (?:`key` in )?`\$\.?(.*?)`$")
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`")

NEUTRAL: dict[str, tuple[object, ...]] = {
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
"""For each field that is not implemented, the values that ask for nothing."""


class StreamOptions(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """How a stream is to be written; obfuscation is not implemented."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Generate(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What completions and chat completions share; the second group is the common extension of OpenAI's."""

    model: str
    max_tokens: Int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: Int | None = None
    seed: Int | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[Int, float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    top_k: Int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: Int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[TokenId] | None = None
    prompt_logprobs: Int | None = None

    # Labels for the client's own use.
    user: Label | None = None
    metadata: dict[Label, Label] | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None

    store: object = None
    service_tier: object = None


class Completion(Generate, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """POST /v1/completions."""

    prompt: Prompt
    echo: bool | None = None
    logprobs: Int | None = None
    best_of: Int | None = None
    suffix: object = None


class TextPart(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """A part of a message; only text is implemented."""

    type: Literal["text"]
    text: str


class Message(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: Label | None = None
    refusal: Literal[""] | None = None


class Chat(Generate, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], msgspec.Meta(min_length=1)]
    max_completion_tokens: Int | None = None
    logprobs: bool | None = None
    top_logprobs: Int | None = None
    tools: object = None
    tool_choice: object = None
    parallel_tool_calls: object = None
    functions: object = None
    function_call: object = None
    response_format: object = None
    modalities: object = None
    audio: object = None
    prediction: object = None
    reasoning_effort: object = None
    verbosity: object = None
    web_search_options: object = None


class Tokenize(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """POST /tokenize: a prompt or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class Detokenize(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """POST /detokenize."""

    tokens: list[TokenId]
    model: str | None = None


class LoadAdapter(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """POST /v1/load_lora_adapter."""

    lora_name: str
    lora_path: str


class UnloadAdapter(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """POST /v1/unload_lora_adapter."""

    lora_name: str


Body = TypeVar("Body", bound=msgspec.Struct)


def decoded(body: bytes, kind: type[Body], what: str = "the request body") -> Body:
    """Decode a body as `kind`; messages call it `what`. Raises ApiError (400) that names the field at fault."""
    try:
        value = msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _field_error(str(error), what) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, f"{what} is not JSON: {error}", None, "invalid_json") from None
    except RecursionError:
        raise ApiError(400, f"{what} is nested too deeply", None, "invalid_json") from None
    for field, given in msgspec.structs.asdict(value).items():
        if given is not None and field in NEUTRAL and given not in NEUTRAL[field]:
            raise refused(field, "this server does not support it: leave the field out", "unsupported_value")
    return value


def _field_error(text: str, what: str) -> ApiError:
    """Express msgspec's message with the field in front and as `param`."""
    place = _PLACE.search(text)
    path, reason = (place[1], text[: place.start()]) if place else ("", text)
    if unknown := _UNKNOWN.fullmatch(reason):
        return refused(_joined(path, unknown[1]), "no such field: leave it out", "unknown_field")
    if missing := _MISSING.fullmatch(reason):
        return refused(_joined(path, missing[1]), "the field is required", "missing_field")
    reason = reason[:1].lower() + reason[1:].replace("`", "").replace(" | null", "")
    if not path:
        return ApiError(400, f"{what}: {reason}", None, "invalid_type")
    return refused(path, reason, "invalid_type")


def _joined(path: str, field: str) -> str:
    return f"{path}.{field}" if path else field
