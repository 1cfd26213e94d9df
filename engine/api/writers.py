"""Write what was generated in the shapes of OpenAI's text and chat completions, log-probabilities included."""

from collections.abc import Iterable, Sequence
from typing import Any

from engine.api.parsing import GenerateRequest, ResponseForm
from engine.api.tools.call_parser import CallParser
from engine.output import Delta
from engine.tokenizer import Tokenizer
from scheduler.plan import FinishReason, TokenLogprob

LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


def finite(logprob: float) -> float:
    """Raise `logprob` to what JSON can carry."""
    return max(logprob, LOWEST)


def token_name(token_id: int, tokenizer: Tokenizer, form: ResponseForm) -> str:
    """Name a token by its text or, if that is asked for, by its id."""
    return f"token_id:{token_id}" if form.tokens_as_ids else tokenizer.token_text(token_id)


def prompt_logprobs_entries(
    entries: Sequence[TokenLogprob], prompt: Sequence[int], tokenizer: Tokenizer
) -> list[dict[str, object] | None] | None:
    """Write one entry per token of `prompt`, the first null: by token id, the token and the likeliest ones.

    None for a prompt that was aborted before it was scored.
    """
    if len(prompt) > 1 and not entries:
        return None
    assert len(entries) == len(prompt) - 1, "the engine scores every prompt token but the first"
    return [None, *(_entry(entry, tokenizer) for entry in entries)]


def _entry(entry: TokenLogprob, tokenizer: Tokenizer) -> dict[str, object]:
    ranked = {token_id: (value, rank) for rank, (token_id, value) in enumerate(entry.top, start=1)}
    ranked[entry.token_id] = (entry.logprob, entry.rank)
    return {
        str(token_id): {
            "logprob": finite(value),
            "rank": rank,
            "decoded_token": tokenizer.token_text(token_id),
        }
        for token_id, (value, rank) in ranked.items()
    }


class CompletionWriter:
    """ChoiceWriter of text completions; a whole response's entry is that of its Deltas joined."""

    chunk_object = whole_object = "text_completion"

    def __init__(self, request: GenerateRequest, tokenizer: Tokenizer) -> None:
        self._request = request
        self._tokenizer = tokenizer
        self._offsets: dict[int, int] = {}  # by choice: where in its text the next token begins

    def opening(self) -> tuple[dict[str, object], ...]:
        """Write nothing: a text completion begins with its text."""
        return ()

    def beside(self, first: Delta) -> dict[str, object]:
        """Write nothing: every choice has its own prompt."""
        return {}

    def part(self, choice: int, delta: Delta) -> dict[str, object] | None:
        """Write the entry of one Delta; None if there is nothing to show yet."""
        first = choice not in self._offsets
        echo = self._request.echo[choice // self._request.params.n] if first and self._request.echo else ""
        text = echo if self._request.echo_only else echo + delta.text
        logprobs = self._logprobs(choice, delta, echo) if self._request.params.logprobs is not None else None
        self._offsets.setdefault(choice, 0)
        ends = delta.finish_reason is not None
        token_ids = delta.token_ids if self._request.form.token_ids else ()
        if not (text or ends or delta.logprobs or delta.prompt_logprobs or token_ids):
            return None
        entry: dict[str, object] = {
            "index": choice,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason.value if delta.finish_reason else None,
            "stop_reason": delta.stop_reason,
        }
        if self._request.echo_only and ends and delta.finish_reason is not FinishReason.ABORT:
            entry |= {"finish_reason": "length", "stop_reason": None}
        prompt = self._request.prompts[choice // self._request.params.n]
        if first and self._request.wants_prompt_logprobs:
            entry["prompt_logprobs"] = prompt_logprobs_entries(delta.prompt_logprobs, prompt, self._tokenizer)
        if self._request.form.token_ids:
            entry |= {"prompt_token_ids": prompt} if first else {}
            entry["token_ids"] = () if self._request.echo_only else token_ids
        return entry

    def whole(self, choice: int, delta: Delta) -> dict[str, object]:
        """Write the entry of a choice whose Deltas are joined in `delta`."""
        entry = self.part(choice, delta)
        assert entry is not None, "a finished choice always has an entry"
        return {"prompt_logprobs": None} | entry

    def _logprobs(self, choice: int, delta: Delta, echo: str) -> dict[str, object]:
        """Write OpenAI's object of four aligned lists. The prompt's first token has no log-probability."""
        drawn = () if self._request.echo_only else delta.logprobs
        known: list[TokenLogprob | None] = [*(delta.prompt_logprobs if echo else ()), *drawn]
        token_ids = [entry.token_id for entry in known if entry is not None]
        if echo:
            known.insert(0, None)
            token_ids.insert(0, self._request.prompts[choice // self._request.params.n][0])
        return {
            "tokens": [self._name(token_id) for token_id in token_ids],
            "token_logprobs": [None if entry is None else finite(entry.logprob) for entry in known],
            "top_logprobs": [None if entry is None else self._top(entry) for entry in known],
            "text_offset": self._advance(choice, token_ids, echo),
        }

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """Write the likeliest tokens and, as OpenAI does, the one that was drawn.

        Of several with one text the likeliest counts.
        """
        pairs: Sequence[tuple[int, float]] = entry.top[: self._request.params.logprobs]
        drawn = (entry.token_id, entry.logprob)
        top: dict[str, float] = {}
        for token_id, value in (*pairs, drawn):
            top.setdefault(self._name(token_id), finite(value))
        return top

    def _name(self, token_id: int) -> str:
        return token_name(token_id, self._tokenizer, self._request.form)

    def _advance(self, choice: int, token_ids: Iterable[int], echo: str) -> list[int]:
        """Return where each token begins in the choice's text, in characters, and go on behind them.

        A special token has text only where the echoed prompt spells it.
        """
        offset, offsets = self._offsets.get(choice, 0), list[int]()
        for token_id in token_ids:
            offsets.append(offset)
            text = self._tokenizer.token_text(token_id) if self._tokenizer.is_special(token_id) else ""
            spelled = bool(text) and echo.startswith(text, offset)
            offset += len(text) if spelled else self._tokenizer.num_chars(token_id)
        self._offsets[choice] = offset
        return offsets


class ChatWriter:
    """ChoiceWriter of chat completions."""

    chunk_object = "chat.completion.chunk"
    whole_object = "chat.completion"

    def __init__(self, request: GenerateRequest, tokenizer: Tokenizer) -> None:
        self._request = request
        self._tokenizer = tokenizer
        self._calls: dict[int, CallParser] = {}  # by choice

    def opening(self) -> tuple[dict[str, object], ...]:
        """Write one entry for each choice that names its role."""
        delta = {"role": "assistant", "content": ""}
        return tuple(
            {"index": choice, "delta": delta, "logprobs": None, "finish_reason": None}
            for choice in range(self._request.params.n)
        )

    def beside(self, first: Delta) -> dict[str, object]:
        """Write the prompt's log-probabilities, null if not asked for, and its token ids if they are."""
        prompt, request = self._request.prompts[0], self._request
        beside: dict[str, object] = {"prompt_logprobs": None}
        if request.wants_prompt_logprobs:
            entries = prompt_logprobs_entries(first.prompt_logprobs, prompt, self._tokenizer)
            beside["prompt_logprobs"] = entries
        return beside | ({"prompt_token_ids": prompt} if request.form.token_ids else {})

    def part(self, choice: int, delta: Delta) -> dict[str, object] | None:
        """Write the entry of one Delta; None if there is nothing to show yet."""
        token_ids = delta.token_ids if self._request.form.token_ids else ()
        text, calls = self._found(choice, delta)
        if not (text or calls or delta.finish_reason or delta.logprobs or token_ids):
            return None
        content: dict[str, object] = {"content": text} if text else {}
        if calls:
            content["tool_calls"] = [{"index": index} | call for index, call in calls.items()]
        return {"index": choice, "delta": content} | self._common(choice, delta)

    def whole(self, choice: int, delta: Delta) -> dict[str, object]:
        """Write the entry of a choice whose Deltas are joined in `delta`."""
        text, calls = self._found(choice, delta)
        message: dict[str, object] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": list(calls.values())}
        return {"index": choice, "message": message} | self._common(choice, delta)

    def _found(self, choice: int, delta: Delta) -> tuple[str, dict[int, dict[str, Any]]]:
        """Return the text that a Delta adds, and what it adds to calls of tools, by the call's number."""
        tools = self._request.tools
        if tools is None:
            return delta.text, {}
        parser = self._calls.setdefault(choice, tools.parser())
        text, calls = "", dict[int, dict[str, Any]]()
        for piece in parser.push(delta.text, final=delta.finish_reason is not None):
            if isinstance(piece, str):
                text += piece
                continue
            call = calls.setdefault(piece.index, {"function": {"arguments": ""}})
            if piece.name is not None:
                call |= {"id": piece.call_id, "type": "function"}
                call["function"] = {"name": piece.name, "arguments": ""}
            call["function"]["arguments"] += piece.arguments
        return text, calls

    def _finish_reason(self, choice: int, delta: Delta) -> str | None:
        """Write why the choice ended; as OpenAI has it, a call of the one tool that was named ends by stop."""
        if delta.finish_reason is None:
            return None
        parser, tools = self._calls.get(choice), self._request.tools
        calls = parser is not None and parser.calls > 0 and tools is not None and tools.syntax != "named"
        return (
            "tool_calls" if calls and delta.finish_reason is FinishReason.STOP else delta.finish_reason.value
        )

    def _common(self, choice: int, delta: Delta) -> dict[str, object]:
        logprobs = None
        if self._request.params.logprobs is not None:
            logprobs = {"content": [self._token(entry) for entry in delta.logprobs], "refusal": None}
        entry: dict[str, object] = {
            "logprobs": logprobs,
            "finish_reason": self._finish_reason(choice, delta),
            "stop_reason": delta.stop_reason,
        }
        return entry | ({"token_ids": delta.token_ids} if self._request.form.token_ids else {})

    def _token(self, entry: TokenLogprob) -> dict[str, object]:
        top = [self._entry(token_id, value) for token_id, value in entry.top[: self._request.params.logprobs]]
        return self._entry(entry.token_id, entry.logprob) | {"top_logprobs": top}

    def _entry(self, token_id: int, logprob: float) -> dict[str, object]:
        content = self._tokenizer.token_bytes(token_id)
        text = token_name(token_id, self._tokenizer, self._request.form)
        return {"token": text, "logprob": finite(logprob), "bytes": list(content)}
