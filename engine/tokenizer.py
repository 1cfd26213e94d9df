"""Turn text and conversations into token ids, and token ids into text. Knows no request.

Tokens become text through their bytes, so that a token's cost does not depend on how many came before it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from engine.errors import EngineError, InvalidConfig
from engine.text.prompt_bound import most_chars_per_token

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class InvalidChat(EngineError):
    """The messages cannot be put through the model's chat template, or it has none."""


class PromptTooLong(EngineError):
    """A prompt that cannot fit the model's context; `field` is the request's field that holds it."""

    def __init__(self, field: str, found: int, unit: str, most_tokens: int, most: int) -> None:
        held = f", which hold at most {most} {unit}" if unit != "tokens" else ""
        super().__init__(
            f"{field} has {found} {unit}, and this model's maximum context length is {most_tokens} tokens{held}:"
            " shorten the prompt"
        )
        self.field = field


class Tokenizer:
    """A model's tokenizer and chat template.

    `vocab_size` counts the ids that the tokenizer knows; a model may draw ids beyond it, which have no text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Take over `tokenizer`; how it decodes bytes is read from its own description."""
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        added = self._backend.get_added_tokens_decoder()
        self._special = {token_id: token.content for token_id, token in added.items() if token.special}
        state = self._backend.decoder.__getstate__() if self._backend.decoder else "{}"
        decoder: dict[str, Any] = json.loads(state)
        steps: set[str] = {step["type"] for step in decoder.get("decoders", [decoder]) if step}
        self._byte_level, self._byte_fallback = "ByteLevel" in steps, "ByteFallback" in steps
        self._bytes: dict[int, bytes] = {}  # what token_bytes has found so far
        self._most_chars_per_token = most_chars_per_token(self._backend)
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @classmethod
    def load(cls, model: str | Path) -> "Tokenizer":
        """Load the tokenizer of a model folder, without the network, or of a hub id. Raises InvalidConfig."""
        folder = Path(model).is_dir()
        try:
            # transformers leaves what follows untyped.
            tokenizer = AutoTokenizer.from_pretrained(  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
                str(model), local_files_only=folder
            )
            made = cls(tokenizer) if isinstance(tokenizer, PreTrainedTokenizerFast) else None
            fault = made and made._find_template_fault()
        except Exception as error:  # whatever its libraries raise for a file that is spoilt
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise InvalidConfig("model", str(model), f"its tokenizer cannot be read: {reason}") from error
        if made is None:
            raise InvalidConfig("model", str(model), "give a folder with a tokenizer.json")
        if fault is not None:
            raise InvalidConfig("model", str(model), f"its chat template is no Jinja template: {fault}")
        return made

    @property
    def has_chat_template(self) -> bool:
        """True if `encode_chat` can succeed."""
        return self._tokenizer.chat_template is not None  # pyright: ignore[reportUnknownMemberType] - as in `load`

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The token with which the tokenizer says that a text ends, if it has one."""
        eos: object = self._tokenizer.eos_token_id  # pyright: ignore[reportUnknownMemberType] - as in `load`
        return (eos,) if isinstance(eos, int) else ()

    def most_chars(self, most_tokens: int) -> int:
        """Return how many characters a text of `most_tokens` tokens may have. See `engine.text.prompt_bound`."""
        return most_tokens * self._most_chars_per_token

    def encode(
        self, text: str, add_special: bool = True, most_tokens: int | None = None, field: str = "prompt"
    ) -> tuple[int, ...]:
        """Turn `text` into token ids; `add_special` adds what the model expects around a prompt (BOS).

        Other threads go on meanwhile. Raises PromptTooLong for a text that `most_tokens` tokens cannot hold.
        """
        if most_tokens is not None and len(text) > (most := self.most_chars(most_tokens)):
            raise PromptTooLong(field, len(text), "characters", most_tokens, most)
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special)
        return tuple(encoding.ids)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, str]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        most_tokens: int | None = None,
        field: str = "messages",
    ) -> tuple[int, ...]:
        """Turn a conversation into token ids by the chat template. Raises InvalidChat, or PromptTooLong as `encode`.

        The text ends with what begins an answer, or within the last message if that is to be continued.
        """
        if not self.has_chat_template:
            raise InvalidChat("the model has no chat template: use /v1/completions with a prompt of your own")
        try:
            text = self._tokenizer.apply_chat_template(  # pyright: ignore[reportUnknownMemberType] - as in `load`
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise InvalidChat(f"the model's chat template refuses these messages: {error}") from error
        return self.encode(str(text), add_special=False, most_tokens=most_tokens, field=field)

    def decode(self, token_ids: Sequence[int], skip_special: bool = True) -> str:
        """Decode a whole sequence; bytes that are no UTF-8 become U+FFFD, unknown ids nothing.

        Other threads go on meanwhile.
        """
        (text,) = self._backend.decode_batch([list(token_ids)], skip_special_tokens=skip_special)
        return text

    def is_special(self, token_id: int) -> bool:
        """Return True for tokens that stand for no text (BOS, EOS, roles)."""
        return token_id in self._special

    def special_among(self, texts: Sequence[str]) -> dict[int, str]:
        """Return the special tokens whose text is one of `texts`."""
        return {token_id: text for token_id, text in self._special.items() if text in texts}

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token adds to the text before it; b"" for ids without a token."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._find_bytes(token_id)
        return known

    def num_chars(self, token_id: int) -> int:
        """Count the characters that begin in a token; summed over a text's tokens, the text's length."""
        if self.is_special(token_id):
            return 0
        return sum(byte & 0xC0 != 0x80 for byte in self.token_bytes(token_id))

    def token_text(self, token_id: int) -> str:
        """Write a token as text; one that is no UTF-8 by itself as `bytes:\\xe4\\xbd`, as OpenAI does."""
        content = self.token_bytes(token_id)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

    def _find_template_fault(self) -> str | None:
        """Return why the chat template can render nothing; None if it can, or if there is none."""
        template = cast(object, self._tokenizer.chat_template)  # as in `load`
        if template is not None and not isinstance(template, (str, dict)):
            return f"it is a {type(template).__name__}"
        try:
            self.encode_chat([{"role": "user", "content": ""}])
        except InvalidChat as error:
            return str(error.__cause__) if isinstance(error.__cause__, TemplateSyntaxError) else None
        return None

    def _find_bytes(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
        if token is None:
            return b""
        if self._byte_level:
            return _bytes_of_symbols(token)
        if self._byte_fallback and (code := _BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(code[1])
        # What the token adds after another one: decoders treat the first token of a text differently.
        once = self._backend.decode([token_id], skip_special_tokens=False)
        twice = self._backend.decode([token_id, token_id], skip_special_tokens=False)
        return twice.removeprefix(once).encode()


def _byte_symbols() -> dict[str, int]:
    """Make byte-level BPE's alphabet: the byte that each of its characters stands for.

    Printable Latin-1 stands for itself, the other bytes, in order, for the characters from U+0100 on.
    Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    symbols = {chr(byte): byte for byte in printable}
    return symbols | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTE_SYMBOLS = _byte_symbols()


def _bytes_of_symbols(token: str) -> bytes:
    """Decode a byte-level token; an added token with other characters stands for itself."""
    try:
        return bytes(_BYTE_SYMBOLS[symbol] for symbol in token)
    except KeyError:
        return token.encode()
