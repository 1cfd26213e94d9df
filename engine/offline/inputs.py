"""Take what offline callers give in the forms that vLLM's LLM takes, and name the place of what is wrong.

It may not know the engine: names of adapters are resolved, and prompts queued, elsewhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import msgspec

from engine.api.schema import Message
from engine.api.tools.chat_messages import chat_messages
from engine.text.template_renderer import InvalidChat
from engine.tokenizer import Tokenizer
from lora.sources.source_url import AdapterSource, InvalidSource, source_of
from scheduler.request import InvalidParameter, SamplingParams, as_integers

Prompt = str | Sequence[int] | Mapping[str, object]
Conversation = Sequence[Mapping[str, object]]
Conversations = Conversation | Sequence[Conversation]
_PROMPT_KEYS = ("prompt", "prompt_token_ids")


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """An adapter by its name and PEFT folder or URL, read when the name is first used; vLLM's has the same fields.

    Without `lora_path` the name is one that the engine knows. `lora_int_id` is taken for vLLM's sake.
    """

    lora_name: str
    lora_int_id: int = 0
    lora_path: str | Path = ""


Params = SamplingParams | Sequence[SamplingParams]
Adapters = str | Sequence[str | None]
LoRARequests = LoRARequest | Sequence[LoRARequest | None]


@dataclass(frozen=True, slots=True)
class AdapterChoice:
    """The adapter of one prompt: its name, None for the base, and the folder or URL to read it from, if given."""

    name: str | None
    folder: AdapterSource | None = None


def prompt_list(prompts: Any) -> list[Any]:
    """Return prompts as a list: a text, a dict, or token ids alone are one prompt."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if isinstance(prompts, bytes) or not isinstance(prompts, Sequence):
        raise InvalidParameter("prompts", prompts, "give a text, token ids, or a list of prompts")
    each = list(cast(Sequence[Any], prompts))
    return [each] if each and all(isinstance(item, int) for item in each) else each


def prompt_token_ids(field: str, prompt: Any, tokenizer: Tokenizer, most_tokens: int) -> tuple[int, ...]:
    """Return a prompt's token ids. Raises InvalidParameter or PromptTooLong that names `field`."""
    if isinstance(prompt, Mapping):
        given = {key: value for key, value in cast(Mapping[Any, Any], prompt).items() if value is not None}
        if unknown := given.keys() - _PROMPT_KEYS:
            raise InvalidParameter(field, sorted(map(str, unknown)), f"give one of {', '.join(_PROMPT_KEYS)}")
        prompt = given.get("prompt_token_ids", given.get("prompt"))
    if isinstance(prompt, str):
        return tokenizer.encode(prompt, most_tokens=most_tokens, field=field)
    return as_integers(field, prompt)


def conversation_list(conversations: Any) -> list[Any]:
    """Return conversations as a list: the messages of one alone are one conversation."""
    if isinstance(conversations, str | bytes | Mapping) or not isinstance(conversations, Sequence):
        raise InvalidParameter(
            "conversations", cast(object, conversations), "give a list of messages, or of such lists"
        )
    each = list(cast(Sequence[Any], conversations))
    return [each] if each and all(isinstance(item, Mapping) for item in each) else each


def chat_token_ids(
    field: str,
    conversation: object,
    tokenizer: Tokenizer,
    most_tokens: int,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[int, ...]:
    """Return a conversation's token ids by the chat template. Raises InvalidChat or PromptTooLong, with `field`."""
    try:
        messages = msgspec.convert(conversation, list[Message], from_attributes=False)
        return tokenizer.encode_chat(
            chat_messages(messages), most_tokens=most_tokens, field=field, tools=tools
        )
    except (msgspec.ValidationError, InvalidChat) as error:
        raise InvalidChat(f"chat refuses these messages, {field}: {error}") from None


def each_params(params: object, sampling_params: object, count: int) -> list[SamplingParams]:
    """Return the parameters of each prompt; `sampling_params` is vLLM's name of `params`."""
    if params is not None and sampling_params is not None:
        raise InvalidParameter("sampling_params", sampling_params, "params is given too, drop one of them")
    given: Any = sampling_params if params is None else params
    if given is None or isinstance(given, SamplingParams):
        return [given or SamplingParams()] * count
    each = _each("params", given, count)
    for number, one in enumerate(each):
        if not isinstance(one, SamplingParams):
            raise InvalidParameter(f"params[{number}]", one, "give a SamplingParams")
    return each


def each_adapter(adapters: object, lora_request: object, count: int) -> list[AdapterChoice]:
    """Return the adapter of each prompt, from names or from LoRARequests: one for all, or one for each."""
    if adapters is not None and lora_request is not None:
        raise InvalidParameter("lora_request", lora_request, "adapters is given too, drop one of them")
    if lora_request is not None:
        requests = _each("lora_request", lora_request, count)
        return [_choice(f"lora_request[{number}]", one) for number, one in enumerate(requests)]
    each = _each("adapters", adapters, count)
    for number, name in enumerate(each):
        if not (name is None or isinstance(name, str)):
            raise InvalidParameter(f"adapters[{number}]", name, "give a name, or None for the base")
    return [AdapterChoice(name) for name in each]


def check_one_folder_a_name(choices: Sequence[AdapterChoice]) -> None:
    """Raise InvalidParameter if one call gives a name two folders."""
    folders: dict[str | None, AdapterSource | None] = {}
    for number, choice in enumerate(choices):
        if folders.setdefault(choice.name, choice.folder) != choice.folder:
            remedy = f"{choice.name!r} has another folder before it in the same call, give each its own name"
            raise InvalidParameter(f"lora_request[{number}]", str(choice.folder), remedy)


def _choice(field: str, request: Any) -> AdapterChoice:
    """Read a LoRARequest, ours or another library's, by its attributes."""
    if request is None:
        return AdapterChoice(None)
    name: object = getattr(request, "lora_name", None)
    folder: object = getattr(request, "lora_path", None) or getattr(request, "path", None)
    if not isinstance(name, str):
        raise InvalidParameter(field, request, "give a LoRARequest, or None for the base")
    if not isinstance(folder, str | Path | None):
        raise InvalidParameter(f"{field}.lora_path", folder, "give the path of a PEFT folder")
    if not folder:
        return AdapterChoice(name)
    try:
        source = source_of(str(folder))
    except InvalidSource as error:
        raise InvalidParameter(f"{field}.lora_path", "(hidden)", str(error)) from None
    return AdapterChoice(name, source.absolute() if isinstance(source, Path) else source)


def _each(field: str, given: Any, count: int) -> list[Any]:
    """Return one value for each prompt: a sequence's, or the same for all."""
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Sequence):
        return [given] * count
    values = list(cast(Sequence[Any], given))
    if len(values) != count:
        raise ValueError(f"{field} has {len(values)} entries for {count} prompts: give one, or one for each")
    return values
