"""Write a conversation as a model's prompt: the model's template, or the one that the operator gives in its place."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from engine.config.option_types import TEMPLATE_SYMBOLS
from engine.errors import EngineError, InvalidConfig
from engine.text.template_renderer import MOST_CHARS, BrokenTemplate, InvalidChat, Rendered, TemplateRenderer
from lora.format.adapter_files import Flaw, read_regular_file
from scheduler.request import InvalidParameter

if TYPE_CHECKING:  # importing it takes seconds, which a process that only tokenises has not
    from transformers import PreTrainedTokenizerFast

MOST_TEMPLATE_BYTES = 1 << 20
_MARK = "CONTINUE_FINAL_MESSAGE_TAG "
_MOST_CLOSING_CHARS = 4096  # what a template may write behind the last message
_MOST_TRIAL_CHARS = 1 << 20  # what a template may add around the messages of a trial
_USER = {"role": "user", "content": "Hello."}
_TRIALS: Sequence[Sequence[Mapping[str, str]]] = (
    [{"role": "user", "content": ""}],
    [{"role": "system", "content": "Be brief."}, _USER],
    [_USER, {"role": "assistant", "content": "Hello."}, _USER],
)


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A template, the special tokens that it may write, and what renders it."""

    source: str
    special_tokens: Mapping[str, object]
    renderer: TemplateRenderer

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        most_chars: int | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Rendered:
        """Write `messages`, and the tools on offer, as one text of at most `most_chars`. Raises InvalidChat."""
        variables = {
            **self.special_tokens,
            "messages": [dict(message) for message in messages],
            "tools": None if tools is None else list(tools),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        return self.renderer.render(self.source, variables, MOST_CHARS if most_chars is None else most_chars)

    def render_continued(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        most_chars: int | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Rendered:
        """Write `messages` up to the end of the last one's content, as transformers finds it: by a mark behind it."""
        last = messages[-1]["content"]
        marked = [*messages[:-1], {**messages[-1], "content": last + _MARK}]
        most = MOST_CHARS if most_chars is None else most_chars
        rendered = self.render(marked, add_generation_prompt, most + _MOST_CLOSING_CHARS, tools)
        if rendered.text is None:
            return Rendered(rendered.length, None, most)
        text, mark, rest = rendered.text.rpartition(_MARK.strip())
        if not mark or last.strip() not in rendered.text:
            raise InvalidChat(
                "the chat template leaves out the last message's content: it cannot be continued"
            )
        if not rest.startswith(" "):  # the template strips what it is given
            text = text.rstrip()
        return Rendered(len(text), text if len(text) <= most else None, most)

    def check(self, encode: Callable[[str], object]) -> None:
        """Raise BrokenTemplate for what is no template, has no end, or writes what `encode` cannot take.

        It need not accept an empty message, or several.
        """
        for messages in _TRIALS:
            try:
                rendered = self.render(messages, most_chars=_MOST_TRIAL_CHARS)
            except BrokenTemplate:
                raise
            except InvalidChat:
                continue
            if rendered.text is None:
                told = f"the chat template makes {rendered.length} characters of a short conversation"
                raise BrokenTemplate(f"{told}: mend it, or give another one")
            try:
                encode(rendered.text)
            except (EngineError, InvalidParameter) as error:
                told = f"the chat template writes what the tokenizer cannot take ({error})"
                raise BrokenTemplate(f"{told}: mend it, or give another one") from error

    def check_of_adapter(self, encode: Callable[[str], object]) -> None:
        """Check the template that comes with an adapter. Raises Flaw."""
        try:
            self.check(encode)
        except BrokenTemplate as error:
            raise Flaw(str(error)) from error


def template_of(
    tokenizer: "PreTrainedTokenizerFast", replacement: str | None, renderer: TemplateRenderer
) -> ChatTemplate | None:
    """Return a tokenizer's template, or the one in its place; None without any. Raises BrokenTemplate."""
    # transformers leaves what follows untyped.
    found = cast(object, tokenizer.chat_template) if replacement is None else replacement
    if isinstance(found, dict):
        named = cast(dict[str, object], found)
        if "default" not in named:
            names = ", ".join(map(str, named))
            raise BrokenTemplate(f"none of the chat templates ({names}) is called default: give one")
        found = named["default"]
    if found is None:
        return None
    if not isinstance(found, str):
        raise BrokenTemplate(
            f"the chat template is no text but {type(found).__name__}: mend it, or give another one"
        )
    return ChatTemplate(found, dict(tokenizer.special_tokens_map), renderer)


def read_template(given: str | Path) -> str:
    """Return the template that an operator gives: a file's content, or the text itself. Raises InvalidConfig."""
    if isinstance(given, str) and any(symbol in given for symbol in TEMPLATE_SYMBOLS):
        return given
    try:
        return read_regular_file(Path(given).expanduser(), MOST_TEMPLATE_BYTES).decode()
    except (FileNotFoundError, Flaw, UnicodeDecodeError) as error:
        remedy = f"give a file that holds a Jinja template, or the template itself ({error})"
        raise InvalidConfig("chat_template", str(given), remedy) from error
