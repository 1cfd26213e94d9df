"""An accelerator in arithmetic: what StepScheduler's plans compute, and what they ought to have computed.

A position's K/V is one integer that depends, as real K/V do, on the adapter and on every token up to it. The
device writes it by slot and reads the whole context back through the block table, so that a wrong block, a
stale one, or one of another adapter's changes the tokens that it draws. `Oracle` computes the same without
any memory.
"""

from dataclasses import dataclass

from lora.activation import NEVER
from lora.adapter import BASE, AdapterRef
from scheduler.plan import PENDING, FinishReason, SequenceKey, Slice, SliceOutput, StepPlan, TokenLogprob
from scheduler.request import Request

VOCABULARY = 5
EOS = 4


def content(adapter: AdapterRef, before: int, token_id: int) -> int:
    """The K/V of a token under the adapter, after a token whose K/V are `before` (0 at the start)."""
    return hash((int(adapter.digest or "0", 16), before, token_id))


def draw(request: Request, index: int, context: tuple[int, ...], outputs: tuple[int, ...]) -> int:
    """The next token of the request's `index`-th sequence, whose K/V are `context`."""
    seen = outputs if request.params.reads_output else ()
    token_id = hash((context, seen, request.params.seed, index)) % VOCABULARY
    banned = len(outputs) < request.params.min_tokens
    return (EOS + 1) % VOCABULARY if banned and token_id == EOS else token_id


def logprob(token_id: int, context: tuple[int, ...]) -> TokenLogprob:
    """The log-probability of `token_id` after `context`."""
    return TokenLogprob(token_id=token_id, logprob=-float(hash(context) % 997), rank=1, top=())


class Device:
    """K/V memory by slot, and the model over it."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._kv: dict[int, int] = {}
        self._drawn: dict[SequenceKey, int] = {}  # by the latest slice that samples

    def run(self, plan: StepPlan) -> tuple[SliceOutput, ...]:
        """Compute a step: first every slice's writes, then every slice's reads, as attention would."""
        written = [slot for part in plan.slices for slot in self._write(part)]
        assert len(set(written)) == len(written), "two rows of a step write one slot"
        outputs = tuple(self._read(part) for part in plan.slices)
        self._drawn |= {
            part.key: output.token_id
            for part, output in zip(plan.slices, outputs, strict=True)
            if output.token_id is not None
        }
        return outputs

    def spoil(self, plan: StepPlan) -> None:
        """Leave nothing of use where the plan's slices wrote, as a step that fails may."""
        for part in plan.slices:
            self._drawn.pop(part.key, None)
            for position in range(part.start, part.start + len(part.token_ids)):
                self._kv[self._slot(part, position)] = -1

    def _slot(self, part: Slice, position: int) -> int:
        block, offset = divmod(position, self._block_size)
        return part.block_table[block] * self._block_size + offset

    def _write(self, part: Slice) -> list[int]:
        stop = part.start + len(part.token_ids)
        assert len(part.block_table) == -(-stop // self._block_size)
        slots = [self._slot(part, position) for position in range(part.start, stop)]
        before = self._kv[self._slot(part, part.start - 1)] if part.start else 0
        for slot, told in zip(slots, part.token_ids, strict=True):
            token_id = self._drawn[part.key] if told == PENDING else told
            self._kv[slot] = before = content(part.adapter, before, token_id)
        return slots

    def _read(self, part: Slice) -> SliceOutput:
        stop = part.start + len(part.token_ids)
        context = tuple(self._kv[self._slot(part, position)] for position in range(stop))
        prompt = part.request.prompt_token_ids
        owed = range(part.start + 1, min(stop + 1, len(prompt))) if part.prompt_logprobs else ()
        if not part.samples:
            token_id = None
        else:
            outputs = part.output_token_ids if part.request.params.reads_output else (0,) * part.output_index
            token_id = draw(part.request, part.key.index, context, outputs)
        return SliceOutput(
            token_id=token_id,
            logprob=None if token_id is None else logprob(token_id, context),
            prompt_logprobs=tuple(logprob(prompt[position], context[:position]) for position in owed),
        )


class Tape:
    """A model that draws the given tokens one after the other, whatever runs."""

    def __init__(self, *token_ids: int) -> None:
        self._token_ids = list(token_ids)

    def run(self, plan: StepPlan) -> tuple[SliceOutput, ...]:
        """Each slice that samples takes the next token of the tape."""
        return tuple(SliceOutput(self._token_ids.pop(0) if part.samples else None) for part in plan.slices)


@dataclass(frozen=True)
class Oracle:
    """What one sequence yields when nothing disturbs it."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    reason: FinishReason
    prompt_logprobs: tuple[TokenLogprob, ...]

    @classmethod
    def of(cls, request: Request, index: int, max_model_len: int) -> "Oracle":
        """Run the request's `index`-th sequence token by token, with no memory to manage."""
        params, prompt = request.params, request.prompt_token_ids
        context: tuple[int, ...] = ()
        before = 0
        prompt_logprobs: list[TokenLogprob] = []
        for position, token_id in enumerate(prompt):
            if position and params.prompt_logprobs is not None:
                prompt_logprobs.append(logprob(token_id, context))
            before = content(request.adapter if position >= request.adapted_from else BASE, before, token_id)
            context += (before,)
        drawer = BASE if request.adapted_from == NEVER else request.adapter
        outputs: tuple[int, ...] = ()
        logprobs: list[TokenLogprob] = []
        while True:
            token_id = draw(request, index, context, outputs)
            logprobs.append(logprob(token_id, context))
            outputs += (token_id,)
            stops = token_id in params.stop_token_ids or (token_id == EOS and not params.ignore_eos)
            if stops and len(outputs) > params.min_tokens:
                return cls(outputs, tuple(logprobs), FinishReason.STOP, tuple(prompt_logprobs))
            if len(outputs) == params.max_tokens or len(prompt) + len(outputs) == max_model_len:
                return cls(outputs, tuple(logprobs), FinishReason.LENGTH, tuple(prompt_logprobs))
            before = content(drawer, before, token_id)
            context += (before,)
