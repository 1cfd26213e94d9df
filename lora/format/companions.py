"""Read what an adapter's folder holds beside the weights that changes how the adapter is asked, and when it ends.

Tokenizers are not known here: what is found is handed on as text, and whoever knows the base model's tokenizer says
whether it can be served. What a peer needs of it travels as JSON.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

from lora.format.adapter_files import Flaw, read_json_object, read_regular_file, short
from lora.format.allowed_roots import ANYWHERE, AllowedRoots
from lora.format.peft_config import CONFIG_FILE as ADAPTER_CONFIG_FILE
from lora.format.peft_config import invocation_of

TOKENIZER_FILE = "tokenizer.json"
TEMPLATE_FILE, _CONFIG_FILE = "chat_template.jinja", "tokenizer_config.json"
_ADDED_FILE, _GENERATION_FILE = "added_tokens.json", "generation_config.json"
COMPANION_FILES = (TOKENIZER_FILE, TEMPLATE_FILE, _CONFIG_FILE, _ADDED_FILE, _GENERATION_FILE)
MOST_TOKENIZER_BYTES = 1 << 26
MOST_TEMPLATE_BYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class Companions:
    """An adapter's own chat template, and the tokens that end its answers beside the base's; empty if it has none."""

    chat_template: str | None = None
    eos_token: str | None = None
    eos_token_ids: tuple[int, ...] = ()


NO_COMPANIONS = Companions()


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens that an adapter's files name, with their ids, and its whole tokenizer.json, if it has one.

    `padding` is the token that only fills up batches in training, `invocation` what an activated LoRA acts from.
    """

    added: tuple[tuple[str, int], ...] = ()
    tokenizer: bytes | None = None
    padding: str | None = None
    invocation: tuple[int, ...] = ()


CompanionsCheck = Callable[[Companions, Vocabulary], None]
"""Raises Flaw for companions, or for tokens that an adapter was trained with, which the base model cannot serve."""


def read_companions(folder: Path, roots: AllowedRoots = ANYWHERE) -> Companions:
    """Read the template and the end tokens. Raises Flaw."""
    config, generation = _object(folder / _CONFIG_FILE, roots), _object(folder / _GENERATION_FILE, roots)
    eos = config.get("eos_token")
    return Companions(
        _template(folder, roots, config.get("chat_template")),
        None if eos is None else _token(_CONFIG_FILE, "eos_token", eos),
        _token_ids(generation.get("eos_token_id")),
    )


def read_vocabulary(folder: Path, roots: AllowedRoots = ANYWHERE) -> Vocabulary:
    """Read which tokens an adapter was trained with. Raises Flaw."""
    config, added = _object(folder / _CONFIG_FILE, roots), _object(folder / _ADDED_FILE, roots)
    found = [(text, _id(_ADDED_FILE, text, token_id)) for text, token_id in added.items()]
    decoder = config.get("added_tokens_decoder", {})
    if not isinstance(decoder, dict):
        raise Flaw(f"{_CONFIG_FILE} has added_tokens_decoder={short(decoder)}: save the tokenizer again")
    for written, token in cast(dict[str, object], decoder).items():
        text = _token(_CONFIG_FILE, "added_tokens_decoder", token)
        found.append((text, _id(_CONFIG_FILE, text, int(written) if written.isdecimal() else written)))
    padding = config.get("pad_token")
    try:
        tokenizer = bytes(read_regular_file(folder / TOKENIZER_FILE, MOST_TOKENIZER_BYTES, roots))
    except FileNotFoundError:
        tokenizer = None
    padded = None if padding is None else _token(_CONFIG_FILE, "pad_token", padding)
    invocation = invocation_of(_object(folder / ADAPTER_CONFIG_FILE, roots))
    return Vocabulary(tuple(found), tokenizer, padded, invocation)


def write_companions(companions: Companions) -> str:
    """Write them as JSON on one line; nothing if there are none."""
    return "" if companions == NO_COMPANIONS else json.dumps(asdict(companions), separators=(",", ":"))


def parse_companions(text: str) -> Companions:
    """Read what `write_companions` wrote. Raises Flaw unless it is that."""
    if not text:
        return NO_COMPANIONS
    try:
        fields = json.loads(text)
        read = Companions(fields["chat_template"], fields["eos_token"], tuple(fields["eos_token_ids"]))
        texts = all(value is None or type(value) is str for value in (read.chat_template, read.eos_token))
        sound = texts and all(type(each) is int for each in read.eos_token_ids)
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise Flaw(f"its chat template and end tokens are damaged ({error!r})") from error
    if not sound or write_companions(read) != text:
        raise Flaw("its chat template and end tokens are damaged")
    return read


def _template(folder: Path, roots: AllowedRoots, configured: object) -> str | None:
    """Return the folder's chat template: of its own file, or of the tokenizer's configuration."""
    try:
        return read_regular_file(folder / TEMPLATE_FILE, MOST_TEMPLATE_BYTES, roots).decode()
    except FileNotFoundError:
        found = _default(cast(list[object], configured)) if isinstance(configured, list) else configured
    except UnicodeDecodeError as error:
        raise Flaw(f"{TEMPLATE_FILE} is no text ({error}): save it in UTF-8") from error
    if found is None or isinstance(found, str):
        return found
    told = short(cast(object, configured))
    raise Flaw(f"{_CONFIG_FILE} has chat_template={told}, which names no default: give one text")


def _default(templates: list[object]) -> object:
    """Return what is called default of several templates; False if nothing is."""
    named = [cast(dict[str, object], each) for each in templates if isinstance(each, dict)]
    return next((each.get("template") for each in named if each.get("name") == "default"), False)


def _object(path: Path, roots: AllowedRoots) -> Mapping[str, object]:
    try:
        return read_json_object(path, roots)
    except FileNotFoundError:
        return {}


def _token(file: str, field: str, value: object) -> str:
    """Return a token's text, which is written by itself or in a description of the token."""
    content = cast(dict[str, object], value).get("content") if isinstance(value, dict) else value
    if not isinstance(content, str):
        told = short(cast(object, value))
        raise Flaw(f"{file} has {told} in {field}, which is no token: save the tokenizer again")
    return content


def _id(file: str, text: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise Flaw(f"{file} gives the token {short(text)} the id {short(value)}: save the tokenizer again")
    return value


def _token_ids(value: object) -> tuple[int, ...]:
    """Return generation_config.json's end tokens: one, several or none."""
    listed = cast(list[object], value) if isinstance(value, list) else [] if value is None else [value]
    return tuple(_id(_GENERATION_FILE, "eos_token_id", each) for each in listed)
