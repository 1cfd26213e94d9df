"""Sequence: one of a request's `n` continuations on its way. Touched by StepScheduler alone.

It knows its tokens, how far they are computed, the blocks that hold their K/V and when it ends; not which
others run, nor where blocks come from.
"""

from scheduler.blocks import block_digest, chain_seed
from scheduler.plan import FinishReason, SequenceKey, Slice, SliceOutput, TokenEvent, TokenLogprob
from scheduler.request import Request


class Sequence:
    """A prompt, the tokens drawn so far, and the `computed_tokens` of them whose K/V lie in `blocks`."""

    __slots__ = (
        "_block_size",
        "_digests",
        "_penalised",
        "adapter_digest",
        "blocks",
        "cached_tokens",
        "computed_tokens",
        "held",
        "in_flight",
        "key",
        "no_room_at",
        "output_token_ids",
        "passed_over_s",
        "prompt_logprobs",
        "prompt_tokens",
        "published_blocks",
        "request",
        "running",
    )

    def __init__(self, request: Request, index: int, block_size: int) -> None:
        self.request = request
        self.key = SequenceKey(request.request_id, index)
        self.adapter_digest: str | None = None if request.adapter.is_base else request.adapter.digest
        self.prompt_tokens = len(request.prompt_token_ids)
        self.output_token_ids: list[int] = []
        self.computed_tokens = 0
        self.blocks: tuple[int, ...] = ()
        self.published_blocks = 0  # the leading blocks that have been offered to the prefix cache
        self.running = False
        self.held = index > 0  # until the first sibling's prompt is there to be shared
        self.in_flight: Slice | None = None
        self.passed_over_s: float | None = None  # when it first could have run but for its adapter
        self.no_room_at: int | None = None  # the pool's releases when it last did not fit
        self.cached_tokens: int | None = None  # None until first admitted
        self.prompt_logprobs: list[TokenLogprob] = []
        self._block_size = block_size
        self._digests: list[bytes] = []
        self._penalised = request.params.penalised

    @property
    def total_tokens(self) -> int:
        """Prompt and output tokens so far."""
        return self.prompt_tokens + len(self.output_token_ids)

    @property
    def prompt_is_computed(self) -> bool:
        """True if the K/V of the whole prompt lie in the sequence's blocks."""
        return self.computed_tokens >= self.prompt_tokens

    @property
    def shareable_blocks(self) -> int:
        """How many leading blocks may come out of the prefix cache.

        The last token must run, for its logits; so must each row that owes the log-probability of the
        prompt token after it.
        """
        tokens = self.total_tokens - 1
        if self._owes_prompt_logprobs:
            tokens = min(tokens, len(self.prompt_logprobs))
        return tokens // self._block_size

    def digests(self, count: int) -> list[bytes]:
        """The chained digests of the first `count` blocks, which must be full; each is computed once."""
        known, size = self._digests, self._block_size
        parent = known[-1] if known else chain_seed(self.request.adapter.digest)
        for block in range(len(known), count):
            parent = block_digest(parent, self._tokens(block * size, (block + 1) * size))
            known.append(parent)
        return known[:count]

    def take(self, limit: int) -> Slice:
        """Put the next tokens that are not computed in flight, at most `limit` of them."""
        start, total = self.computed_tokens, self.total_tokens
        stop = total if total - start <= limit else start + limit
        in_prompt = start < self.prompt_tokens
        self.in_flight = part = Slice(
            key=self.key,
            request=self.request,
            token_ids=self._tokens(start, stop),
            start=start,
            block_table=self.blocks[: -(-stop // self._block_size)],
            samples=stop == total,
            output_index=len(self.output_token_ids),
            output_token_ids=tuple(self.output_token_ids) if self._penalised else (),
            prompt_logprobs=in_prompt and self._owes_prompt_logprobs and stop > len(self.prompt_logprobs),
        )
        return part

    def land(self, part: Slice, output: SliceOutput) -> None:
        """Take in what the slice in flight computed."""
        assert (output.token_id is not None) == part.samples, f"{self.key}: a token if and only if it samples"
        if part.prompt_logprobs:
            known = len(self.prompt_logprobs) - part.start
            self.prompt_logprobs.extend(output.prompt_logprobs[known:])
        if output.token_id is not None:
            self.output_token_ids.append(output.token_id)
        self.computed_tokens = part.start + len(part.token_ids)
        self.in_flight = None

    def lose_blocks(self) -> None:
        """Forget the K/V, not the tokens: the sequence will be recomputed. A slice in flight is void."""
        self.blocks = ()
        self.computed_tokens = 0
        self.published_blocks = 0
        self.running = False
        self.in_flight = None

    def follow(self, first: "Sequence") -> None:
        """Stop waiting for the first sibling, and take over what it learned about their common prompt."""
        self.held = False
        self._digests = first.digests(self.prompt_tokens // self._block_size)
        self.prompt_logprobs = list(first.prompt_logprobs)

    def finish_reason(self, max_model_len: int) -> FinishReason | None:
        """Why the sequence ends with its last output token, or None if it goes on."""
        params, token_id, drawn = self.request.params, self.output_token_ids[-1], len(self.output_token_ids)
        if drawn > params.min_tokens:
            ends = not params.ignore_eos and token_id in self.request.eos_token_ids
            if ends or token_id in params.stop_token_ids:
                return FinishReason.STOP
        if drawn == params.max_tokens or self.total_tokens >= max_model_len:
            return FinishReason.LENGTH
        return None

    def event(self, output: SliceOutput, reason: FinishReason | None) -> TokenEvent:
        """What the client learns of the last output token; its first event tells of the prompt too."""
        if len(self.output_token_ids) > 1:
            return TokenEvent(self.key, output.token_id, output.logprob, reason)
        return TokenEvent(
            key=self.key,
            token_id=output.token_id,
            logprob=output.logprob,
            finish_reason=reason,
            prompt_logprobs=tuple(self.prompt_logprobs),
            cached_tokens=self.cached_tokens or 0,
        )

    @property
    def _owes_prompt_logprobs(self) -> bool:
        wanted = self.request.params.prompt_logprobs is not None
        return wanted and len(self.prompt_logprobs) < self.prompt_tokens - 1

    def _tokens(self, start: int, stop: int) -> tuple[int, ...]:
        split = self.prompt_tokens
        if stop <= split:
            return self.request.prompt_token_ids[start:stop]
        if start >= split:
            return tuple(self.output_token_ids[start - split : stop - split])
        return self.request.prompt_token_ids[start:] + tuple(self.output_token_ids[: stop - split])
