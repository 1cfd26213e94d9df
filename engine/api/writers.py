"""Write what was generated in the shapes of OpenAI's text and chat completions, log-probabilities included."""

from collections.abc import Iterable, Sequence

from engine.api.parsing import GenerateRequest
from engine.tokenizer import Delta, Tokenizer
from scheduler.plan import TokenLogprob

LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


def finite(logprob: float) -> float:
    """`logprob` as JSON can carry it."""
    return max(logprob, LOWEST)


def prompt_logprobs_entries(
    entries: Sequence[TokenLogprob], prompt: Sequence[int], codec: Tokenizer
) -> list[dict[str, object] | None]:
    """One entry per token of `prompt`, the first null: by token id, the token itself and the most likely
    ones."""
    assert len(entries) == len(prompt) - 1, "the engine scores every prompt token but the first"
    return [None, *(_entry(entry, codec) for entry in entries)]


def _entry(entry: TokenLogprob, codec: Tokenizer) -> dict[str, object]:
    ranked = {token_id: (value, rank) for rank, (token_id, value) in enumerate(entry.top, start=1)}
    ranked[entry.token_id] = (entry.logprob, entry.rank)
    return {
        str(token_id): {"logprob": finite(value), "rank": rank, "decoded_token": codec.token_text(token_id)}
        for token_id, (value, rank) in ranked.items()
    }


class CompletionWriter:
    """Turns Deltas into `choices` entries; a whole answer's entry is that of its Deltas joined."""

    chunk_object = whole_object = "text_completion"

    def __init__(self, ask: GenerateRequest, codec: Tokenizer) -> None:
        self._ask = ask
        self._codec = codec
        self._offsets: dict[int, int] = {}  # by choice: where in its text the next token begins

    def opening(self) -> tuple[dict[str, object], ...]:
        """Entries before anything is generated: none."""
        return ()

    def part(self, choice: int, delta: Delta) -> dict[str, object] | None:
        """The entry of one Delta; None if there is nothing to show yet."""
        first = choice not in self._offsets
        echo = self._ask.echo[choice // self._ask.params.n] if first and self._ask.echo else ""
        text = echo if self._ask.silent else echo + delta.text
        logprobs = (
            self._logprobs(choice, delta, bool(echo)) if self._ask.params.logprobs is not None else None
        )
        self._offsets.setdefault(choice, 0)
        ends = delta.finish_reason is not None
        if not (text or ends or delta.logprobs or delta.prompt_logprobs):
            return None
        entry: dict[str, object] = {
            "index": choice,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason.value if delta.finish_reason else None,
            "stop_reason": delta.stop_reason,
        }
        if self._ask.silent and ends:
            entry |= {"finish_reason": "length", "stop_reason": None}
        if first and self._ask.wants_prompt_logprobs:
            prompt = self._ask.prompts[choice // self._ask.params.n]
            entry["prompt_logprobs"] = prompt_logprobs_entries(delta.prompt_logprobs, prompt, self._codec)
        return entry

    def whole(self, choice: int, delta: Delta) -> dict[str, object]:
        """The entry of a choice whose Deltas are joined in `delta`."""
        entry = self.part(choice, delta)
        assert entry is not None, "a finished choice always has an entry"
        return entry

    def _logprobs(self, choice: int, delta: Delta, echo: bool) -> dict[str, object]:
        """OpenAI's object of four aligned lists. The prompt's first token has no log-probability."""
        drawn = () if self._ask.silent else delta.logprobs
        known: list[TokenLogprob | None] = [*(delta.prompt_logprobs if echo else ()), *drawn]
        token_ids = [entry.token_id for entry in known if entry is not None]
        if echo:
            known.insert(0, None)
            token_ids.insert(0, self._ask.prompts[choice // self._ask.params.n][0])
        texts = [self._codec.token_text(token_id) for token_id in token_ids]
        return {
            "tokens": texts,
            "token_logprobs": [None if entry is None else finite(entry.logprob) for entry in known],
            "top_logprobs": [None if entry is None else self._top(entry) for entry in known],
            "text_offset": self._advance(choice, token_ids),
        }

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """The most likely tokens and, as OpenAI does, the one that was drawn."""
        pairs: Sequence[tuple[int, float]] = entry.top[: self._ask.params.logprobs]
        drawn = (entry.token_id, entry.logprob)
        return {self._codec.token_text(token_id): finite(value) for token_id, value in (*pairs, drawn)}

    def _advance(self, choice: int, token_ids: Iterable[int]) -> list[int]:
        """Where each token begins in the choice's text, in characters."""
        offset, offsets = self._offsets.get(choice, 0), []
        for token_id in token_ids:
            offsets.append(offset)
            offset += self._codec.num_chars(token_id)
        self._offsets[choice] = offset
        return offsets


class ChatWriter:
    """Turns Deltas into `choices` entries of chunks, and joined Deltas into those of whole answers."""

    chunk_object = "chat.completion.chunk"
    whole_object = "chat.completion"

    def __init__(self, ask: GenerateRequest, codec: Tokenizer) -> None:
        self._ask = ask
        self._codec = codec

    def opening(self) -> tuple[dict[str, object], ...]:
        """Entries before anything is generated: who speaks."""
        said = {"role": "assistant", "content": ""}
        return tuple(
            {"index": choice, "delta": said, "logprobs": None, "finish_reason": None}
            for choice in range(self._ask.params.n)
        )

    def part(self, choice: int, delta: Delta) -> dict[str, object] | None:
        """The entry of one Delta; None if there is nothing to show yet."""
        if not (delta.text or delta.finish_reason or delta.logprobs or delta.prompt_logprobs):
            return None
        said = {"content": delta.text} if delta.text else {}
        return {"index": choice, "delta": said} | self._around(delta)

    def whole(self, choice: int, delta: Delta) -> dict[str, object]:
        """The entry of a choice whose Deltas are joined in `delta`."""
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        return {"index": choice, "message": message} | self._around(delta)

    def _around(self, delta: Delta) -> dict[str, object]:
        logprobs = None
        if self._ask.params.logprobs is not None:
            logprobs = {"content": [self._token(entry) for entry in delta.logprobs], "refusal": None}
        entry: dict[str, object] = {
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason.value if delta.finish_reason else None,
            "stop_reason": delta.stop_reason,
        }
        if delta.prompt_logprobs:
            prompt = self._ask.prompts[0]
            entry["prompt_logprobs"] = prompt_logprobs_entries(delta.prompt_logprobs, prompt, self._codec)
        return entry

    def _token(self, entry: TokenLogprob) -> dict[str, object]:
        top = [self._entry(token_id, value) for token_id, value in entry.top[: self._ask.params.logprobs]]
        return self._entry(entry.token_id, entry.logprob) | {"top_logprobs": top}

    def _entry(self, token_id: int, logprob: float) -> dict[str, object]:
        spelled = self._codec.token_bytes(token_id)
        text = self._codec.token_text(token_id)
        return {"token": text, "logprob": finite(logprob), "bytes": list(spelled)}
