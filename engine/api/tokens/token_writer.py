"""Write what was generated as token ids, in the shape of vLLM's POST /inference/v1/generate."""

from engine.api.parsing import GenerateRequest
from engine.api.writers import finite, prompt_logprobs_entries, token_name
from engine.output import Delta
from engine.tokenizer import Tokenizer
from scheduler.plan import TokenLogprob


class TokenWriter:
    """ChoiceWriter of token ids. Log-probabilities have the form of chat's; tokens are named by their ids."""

    chunk_object = whole_object = None

    def __init__(self, request: GenerateRequest, tokenizer: Tokenizer) -> None:
        self._request, self._tokenizer = request, tokenizer

    def opening(self) -> tuple[dict[str, object], ...]:
        """Write nothing: a stream begins with its first tokens."""
        return ()

    def beside(self, first: Delta) -> dict[str, object]:
        """Write the prompt's log-probabilities, null if not asked for; no K/V is ever handed over."""
        entries = None
        if self._request.wants_prompt_logprobs:
            prompt = self._request.prompts[0]
            entries = prompt_logprobs_entries(first.prompt_logprobs, prompt, self._tokenizer)
        return {"prompt_logprobs": entries, "kv_transfer_params": None}

    def part(self, choice: int, delta: Delta) -> dict[str, object] | None:
        """Write the entry of one Delta; None if it has neither a token nor an end."""
        if not (delta.token_ids or delta.finish_reason):
            return None
        return {
            "index": choice,
            "logprobs": self._logprobs(delta),
            "finish_reason": delta.finish_reason.value if delta.finish_reason else None,
            "token_ids": delta.token_ids,
        }

    def whole(self, choice: int, delta: Delta) -> dict[str, object]:
        """Write the entry of a choice whose Deltas are joined in `delta`."""
        entry = self.part(choice, delta)
        assert entry is not None, "a finished choice always has an entry"
        return entry

    def _logprobs(self, delta: Delta) -> dict[str, object] | None:
        if self._request.params.logprobs is None:
            return None
        return {"content": [self._token(entry) for entry in delta.logprobs]}

    def _token(self, entry: TokenLogprob) -> dict[str, object]:
        top = [self._entry(*pair) for pair in entry.top[: self._request.params.logprobs]]
        return self._entry(entry.token_id, entry.logprob) | {"top_logprobs": top}

    def _entry(self, token_id: int, logprob: float) -> dict[str, object]:
        name = token_name(token_id, self._tokenizer, self._request.form)
        return {"token": name, "logprob": finite(logprob), "bytes": None}
