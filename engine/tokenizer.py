"""Turn text and conversations into token ids, and token ids into text. Knows no request.

Tokens become text through their bytes, so that a token's cost does not depend on how many came before it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from engine.errors import EngineError
from engine.structured.grammar_cache import TokenTable
from engine.text.chat_template import ChatTemplate, template_of
from engine.text.prompt_bound import most_chars_per_token
from engine.text.template_renderer import InvalidChat, TemplateRenderer
from engine.text.tool_syntax import ToolParser, ToolSyntax, tool_syntax
from engine.text.vocabulary_check import check_invocation, check_vocabulary, end_tokens
from lora.format.companions import NO_COMPANIONS, Companions, Vocabulary
from scheduler.request import InvalidParameter

if TYPE_CHECKING:  # importing it takes seconds, which a process that only tokenises has not
    from transformers import PreTrainedTokenizerFast

_SHOWN_CHARS = 40
_MOST_ADAPTERS = 1024  # whose own templates are kept at once
_SAMPLE = "Hello, world 1 \u00e9 \U0001f600"  # what every tokenizer can take and give back
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class TokenizerFailed(EngineError):
    """The tokenizer's library failed on a text, which no sound tokenizer.json makes it do."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(f"the tokenizer failed ({cause}): check the model's tokenizer.json")


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
    `companions` are the adapter's whose tokenizer it is. It can be pickled for another process.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerFast",
        chat_template: str | None = None,
        tool_parser: ToolParser = "auto",
    ) -> None:
        """Take over `tokenizer`; how it decodes bytes is read from its own description.

        `chat_template` replaces its own one. Raises BrokenTemplate if it has none that it may be used by itself.
        """
        self._tool_parser: ToolParser = tool_parser
        self._renderer, self._adapter_renderer = TemplateRenderer(), TemplateRenderer()
        self._template = template_of(tokenizer, chat_template, self._renderer)
        self._special_tokens = dict(tokenizer.special_tokens_map)
        eos: object = tokenizer.eos_token_id  # pyright: ignore[reportUnknownMemberType] - transformers leaves it untyped
        self.eos_token_ids = (eos,) if isinstance(eos, int) else ()
        self.companions = NO_COMPANIONS
        self._of_adapters: dict[Companions, Tokenizer] = {}
        self._vocabularies = set[object]()  # of adapters, found to be the base's
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

    def check(self) -> None:
        """Raise TokenizerFailed or BrokenTemplate if what every text and conversation needs does not work."""
        self.decode(self.encode(_SAMPLE))
        if self._template is not None:
            self._template.check(self.encode)

    @property
    def has_chat_template(self) -> bool:
        """True if `encode_chat` can succeed."""
        return self._template is not None

    @property
    def tool_syntax(self) -> ToolSyntax | None:
        """How the model writes calls of tools, if that is known."""
        return tool_syntax(self._tool_parser, self._template.source if self._template else None)

    def of_adapter(self, companions: Companions) -> "Tokenizer":
        """Return the tokenizer of an adapter with its own chat template and end tokens; this one if it has none.

        Raises Flaw for what cannot be served.
        """
        if companions == NO_COMPANIONS:
            return self
        known = self._of_adapters.get(companions)
        if known is None:
            if len(self._of_adapters) >= _MOST_ADAPTERS:
                self._of_adapters.clear()
            known = self._of_adapters[companions] = self._make_of_adapter(companions)
        return known

    def check_adapter(self, companions: Companions, vocabulary: Vocabulary) -> None:
        """Raise Flaw for an adapter that was trained with other tokens, or whose companions cannot be served."""
        digest = blake3(vocabulary.tokenizer or b"").digest()
        if (checked := (vocabulary.added, vocabulary.padding, digest)) not in self._vocabularies:
            check_vocabulary(
                self._backend, vocabulary
            )  # a second or so, and many adapters have the same files
            self._vocabularies.add(checked)
        check_invocation(self._backend, vocabulary.invocation)
        self.of_adapter(companions)

    def close(self) -> None:
        """End the processes that render chat templates."""
        self._renderer.close()
        self._adapter_renderer.close()

    def most_chars(self, most_tokens: int) -> int:
        """Return how many characters a text of `most_tokens` tokens may have. See `engine.text.prompt_bound`."""
        return most_tokens * self._most_chars_per_token

    def encode(
        self, text: str, add_special: bool = True, most_tokens: int | None = None, field: str = "prompt"
    ) -> tuple[int, ...]:
        """Turn `text` into token ids; `add_special` adds what the model expects around a prompt (BOS).

        Other threads go on meanwhile. Raises PromptTooLong for a text of more than `most_tokens` tokens, or of
        more characters than these can hold, and InvalidParameter for what is no text.
        """
        if most_tokens is not None and len(text) > (most := self.most_chars(most_tokens)):
            raise PromptTooLong(field, len(text), "characters", most_tokens, most)
        try:
            (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special)
        except TypeError:  # what its library raises for a text that is none
            remedy = "it has surrogates, which no text in UTF-8 has: leave them out"
            raise InvalidParameter(field, text[:_SHOWN_CHARS], remedy) from None
        except BaseException as error:
            if (
                type(error).__name__ != "PanicException"
            ):  # of a library in Rust: no Exception, and not importable
                raise
            raise TokenizerFailed(error) from error
        if (
            most_tokens is not None and len(encoding) > most_tokens
        ):  # millions of ids are not made to be refused
            raise PromptTooLong(field, len(encoding), "tokens", most_tokens, most_tokens)
        return tuple(encoding.ids)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        most_tokens: int | None = None,
        field: str = "messages",
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> tuple[int, ...]:
        """Turn a conversation into token ids by the chat template. Raises InvalidChat, or PromptTooLong as `encode`.

        The text ends with what begins an answer, or within the last message if that is to be continued.
        """
        if self._template is None:
            raise InvalidChat(
                "the model has no chat template: start the server with --chat-template, or use /v1/completions"
                " with a prompt of your own"
            )
        most_chars = None if most_tokens is None else self.most_chars(most_tokens)
        write = self._template.render_continued if continue_final_message else self._template.render
        rendered = write(messages, add_generation_prompt, most_chars, tools)
        if rendered.text is None:
            most = rendered.most_chars
            raise PromptTooLong(field, rendered.length, "characters", most_tokens or most, most)
        try:
            return self.encode(rendered.text, False, most_tokens, field)
        except InvalidParameter as error:
            if any(_has_surrogates(message["content"]) for message in messages):
                raise
            raise InvalidChat(
                f"the chat template makes no text of these messages ({error}): mend it, or give another one"
            ) from error

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

    def table(self, vocab_size: int) -> TokenTable:
        """Return the bytes of all ids below `vocab_size`, as one that follows a text adds them. It takes a while."""
        special = frozenset(token_id for token_id in self._special if token_id < vocab_size)
        tokens = [self.token_bytes(token_id) for token_id in range(vocab_size)]
        return TokenTable(tokens, special, lambda text: self.encode(text, add_special=False))

    def token_text(self, token_id: int) -> str:
        """Write a token as text; one that is no UTF-8 by itself as `bytes:\\xe4\\xbd`, as OpenAI does."""
        content = self.token_bytes(token_id)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

    def _make_of_adapter(self, companions: Companions) -> "Tokenizer":
        made = copy(self)
        made.companions = companions
        made.eos_token_ids = (*self.eos_token_ids, *end_tokens(self._backend, companions))
        special = self._special_tokens
        if companions.eos_token is not None:
            special = special | {"eos_token": companions.eos_token}
        if companions.chat_template is not None:
            made._template = ChatTemplate(companions.chat_template, special, self._adapter_renderer)
            made._template.check_of_adapter(self.encode)
        elif self._template is not None:
            made._template = replace(self._template, special_tokens=special)
        return made

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


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= char <= "\udfff" for char in text)


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
