"""Sequence: one of a request's `n` continuations on its way. Touched by StepScheduler alone.

It knows its tokens, how far they are computed, the blocks that hold their K/V and when it ends; not which
others run, nor who is given which blocks.
"""

import math

from lora.activation import NEVER
from scheduler.blocks import BlockPool, adapted_parent, block_digest, chain_seed
from scheduler.plan import (
    PENDING,
    FinishReason,
    SequenceKey,
    Slice,
    SliceOutput,
    TokenEvent,
    TokenLogprob,
)
from scheduler.request import Request

Order = tuple[int, int, float, float]
"""What waiting sequences are compared by: begun, new or in the background, then priority, deadline and arrival."""

_FIRST: Order = (0, 0, 0.0, 0.0)


def _order(request: Request) -> Order:
    """Return a new sequence's place; one that has moved here has begun already."""
    if request.drawn_token_ids:
        return _FIRST
    by_s = math.inf if request.first_token_by_s is None else request.first_token_by_s
    return 2 if request.background else 1, request.priority, by_s, request.arrival_s


class Sequence:
    """A prompt, the tokens drawn so far, and the `computed_tokens` of them whose K/V lie in `blocks`.

    Slices in flight run ahead of that: once they are committed, `planned_tokens` of `expected_tokens` are computed.
    """

    __slots__ = (
        "_block_size",
        "_digests",
        "_ends_with",
        "_passed_over_s",
        "_rotated_by",
        "adapted_from",
        "adapter_digest",
        "blocks",
        "cached_tokens",
        "computed_tokens",
        "drawing",
        "expected_tokens",
        "has_begun",
        "in_flight",
        "key",
        "most_tokens",
        "no_room_at",
        "order",
        "output_token_ids",
        "planned_tokens",
        "prompt_logprobs",
        "prompt_tokens",
        "published_blocks",
        "reads_ahead",
        "reads_output",
        "request",
        "room_tokens",
        "running",
        "waits_for_sibling",
    )

    def __init__(
        self, request: Request, index: int, block_size: int, max_model_len: int, rotated_by: int = 0
    ) -> None:
        self.request = request
        self.key = SequenceKey(request.request_id, index)
        self.adapted_from = request.adapted_from
        unused = request.adapter.is_base or request.adapted_from == NEVER
        self.adapter_digest: str | None = None if unused else request.adapter.digest
        self.reads_ahead = 0 < request.adapted_from < NEVER  # see may_read_ahead
        self.prompt_tokens = len(request.prompt_token_ids)
        self.output_token_ids = list(request.drawn_token_ids)
        self.computed_tokens = 0
        self.blocks: tuple[int, ...] = ()
        self.room_tokens = 0  # tokens whose K/V the blocks hold
        self.published_blocks = 0  # the leading blocks that have been offered to the prefix cache
        self.running = False
        self.waits_for_sibling = index > 0  # until the first sibling's prompt is there to be shared
        self.in_flight: list[Slice] = []  # those of plans that are not committed, in their order
        self.planned_tokens = 0  # computed_tokens once what is in flight is committed
        self.drawing = 0  # tokens that the slices in flight draw
        # total_tokens once what is in flight is committed and ended nothing
        self.expected_tokens = self.prompt_tokens + len(self.output_token_ids)
        params = request.params
        most = params.max_tokens
        self.most_tokens = min(max_model_len, self.prompt_tokens + most) if most else max_model_len
        self._ends_with = request.end_token_ids
        self._passed_over_s: float | None = None  # when it first could have run but for its adapter
        self.no_room_at: int | None = None  # the pool's releases when it last did not fit
        self.has_begun = bool(
            request.drawn_token_ids
        )  # it ran already, or its first sibling did, or elsewhere
        self.order: Order = _order(request)
        self.cached_tokens: int | None = None  # None until first admitted
        self.prompt_logprobs: list[TokenLogprob] = []
        self._block_size = block_size
        self._rotated_by = rotated_by  # as chain_seed takes it
        self._digests: list[bytes] = []
        self.reads_output = params.reads_output

    @property
    def total_tokens(self) -> int:
        """Count the prompt and output tokens so far."""
        return self.prompt_tokens + len(self.output_token_ids)

    @property
    def may_run_ahead(self) -> bool:
        """Return whether its next slice can be planned before what is in flight has run."""
        return not self.drawing or (not self.reads_output and self.expected_tokens < self.most_tokens)

    @property
    def may_read_ahead(self) -> bool:
        """Return whether its next tokens run without its adapter: those before an activated LoRA's invocation.

        It may do so once. Then it waits for the adapter as others do, since to lose its blocks again costs a step.
        """
        return self.reads_ahead and self.planned_tokens < self.adapted_from

    @property
    def shareable_blocks(self) -> int:
        """Return how many leading blocks may come out of the prefix cache.

        The last token must run, for its logits; so must each row that owes the log-probability of the prompt
        token after it.
        """
        tokens = self.total_tokens - 1
        if self._owes_prompt_logprobs:
            tokens = min(tokens, len(self.prompt_logprobs))
        return tokens // self._block_size

    def digests(self, count: int) -> list[bytes]:
        """Return the chained digests of the first `count` blocks, which must be full; each is computed once."""
        known, size = self._digests, self._block_size
        adapter = self.request.adapter.digest
        if known:
            parent = known[-1]
        else:
            first = "" if self.adapted_from else adapter
            parent = chain_seed(first, self._rotated_by, self.request.cache_salt)
        adapted = self.adapted_from // size if self.adapted_from else NEVER
        for block in range(len(known), count):
            if block == adapted:
                parent = adapted_parent(parent, adapter, self.adapted_from)
            parent = block_digest(parent, self._tokens(block * size, (block + 1) * size))
            known.append(parent)
        return known[:count]

    def hold(self, blocks: tuple[int, ...]) -> None:
        """Take blocks for the positions after those that it has blocks for."""
        self.blocks += blocks
        self.room_tokens = len(self.blocks) * self._block_size

    def publish_full(self, pool: BlockPool) -> None:
        """Offer the blocks that became full to the prefix cache."""
        full = self.computed_tokens // self._block_size
        digests = self.digests(full)
        for block in range(self.published_blocks, full):
            pool.publish(self.blocks[block], digests[block])
        self.published_blocks = full

    def has_to_read_ahead(self, pool: BlockPool) -> bool:
        """Return whether blocks before an activated LoRA's invocation are to be read; asked until there are none."""
        if self.reads_ahead:
            before = min(self.adapted_from // self._block_size, self.shareable_blocks)
            self.reads_ahead = len(pool.lookup(self.digests(before))) < before
        return self.reads_ahead

    def pass_over(self, now: float, patience_s: float) -> bool:
        """Leave it out of a plan for want of its adapter; tell whether that has lasted for its patience.

        One in the background has no end of patience: nobody waits for it.
        """
        if self._passed_over_s is None:
            self._passed_over_s = now
        return now - self._passed_over_s >= patience_s and not self.request.background

    def take(self, limit: int) -> Slice:
        """Put the next tokens that are not computed in flight, at most `limit` of them."""
        self._passed_over_s = None
        start, total = self.planned_tokens, self.expected_tokens
        stop = total if total - start <= limit else start + limit
        if start < self.adapted_from < stop:  # a slice is wholly the base's or wholly the adapter's
            stop = self.adapted_from
        if start >= self.prompt_tokens and start + 1 == total:  # decode, step after step
            tokens = (PENDING if self.drawing else self.output_token_ids[-1],)
            scores = False
        else:
            tokens = self._tokens(start, stop)
            unscored = stop > len(self.prompt_logprobs)
            scores = start < self.prompt_tokens and unscored and self._owes_prompt_logprobs
        covers = stop > self.room_tokens - self._block_size
        part = Slice(
            self.key,
            self.request,
            tokens,
            start,
            self.blocks if covers else self.blocks[: -(-stop // self._block_size)],
            stop == total,
            total - self.prompt_tokens,
            tuple(self.output_token_ids) if self.reads_output else (),
            scores,
        )
        self.in_flight.append(part)
        self.planned_tokens = stop
        if stop == total:
            self.drawing += 1
            self.expected_tokens += 1
        return part

    def commit(self, part: Slice, output: SliceOutput) -> TokenEvent | None:
        """Take in what the oldest slice in flight computed: what the client learns of it, if it drew a token."""
        token_id, logprob = output.token_id, output.logprob
        assert (token_id is not None) == part.samples, f"{self.key}: a token if and only if it samples"
        if part.prompt_logprobs:
            known = len(self.prompt_logprobs) - part.start
            self.prompt_logprobs.extend(output.prompt_logprobs[known:])
        self.computed_tokens = part.start + len(part.token_ids)
        del self.in_flight[0]
        if token_id is None:
            return None
        outputs = self.output_token_ids
        outputs.append(token_id)
        self.drawing -= 1
        drawn = len(outputs)
        reason = None
        if token_id in self._ends_with and drawn > self.request.params.min_tokens:
            reason = FinishReason.STOP
        elif self.prompt_tokens + drawn >= self.most_tokens:
            reason = FinishReason.LENGTH
        if drawn > 1:
            return TokenEvent(self.key, token_id, logprob, reason)
        told = tuple(self.prompt_logprobs)  # a sequence's first event tells of the prompt too
        return TokenEvent(self.key, token_id, logprob, reason, told, self.cached_tokens or 0)

    def lose_blocks(self) -> None:
        """Forget the K/V, not the tokens: the sequence will be recomputed. Slices in flight are void."""
        self.blocks = ()
        self.room_tokens = 0
        self.computed_tokens = 0
        self.published_blocks = 0
        self.running = False
        self.order = _FIRST
        self.void_slices()

    def void_slices(self) -> None:
        """Take back what is in flight: it will be planned again, into the same blocks."""
        self.in_flight.clear()
        self.planned_tokens = self.computed_tokens
        self.expected_tokens -= self.drawing
        self.drawing = 0

    def share_prompt_of(self, first: "Sequence") -> None:
        """Stop waiting for the first sibling, and take over what it learned about their common prompt."""
        self.waits_for_sibling = False
        self.has_begun = True
        self._digests = first.digests(self.prompt_tokens // self._block_size)
        self.prompt_logprobs = list(first.prompt_logprobs)

    @property
    def _owes_prompt_logprobs(self) -> bool:
        wanted = self.request.params.prompt_logprobs is not None
        wanted = wanted and not self.request.drawn_token_ids  # they were told with the first token, elsewhere
        return wanted and len(self.prompt_logprobs) < self.prompt_tokens - 1

    def _tokens(self, start: int, stop: int) -> tuple[int, ...]:
        """Return the tokens of positions start .. stop - 1; one past the tokens drawn so far is PENDING."""
        outputs, split = self.output_token_ids, self.prompt_tokens
        if stop <= split:
            return self.request.prompt_token_ids[start:stop]
        drawn = stop - split
        if drawn > len(outputs):
            return (*self._tokens(start, stop - 1), PENDING) if stop - start > 1 else (PENDING,)
        if start >= split:
            return tuple(outputs[start - split : drawn]) if stop - start > 1 else (outputs[start - split],)
        return self.request.prompt_token_ids[start:] + tuple(outputs[:drawn])
