"""ChatWriter: what was generated, in the shape of OpenAI's chat completions."""

from engine.api.logprobs import finite, prompt_logprobs_entries
from engine.api.openai import Ask
from engine.text import Delta, TextCodec
from scheduler.plan import TokenLogprob


class ChatWriter:
    """Turns Deltas into `choices` entries of chunks, and joined Deltas into those of whole answers."""

    chunk_object = "chat.completion.chunk"
    whole_object = "chat.completion"

    def __init__(self, ask: Ask, codec: TextCodec) -> None:
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
