"""Executor: one StepPlan in, one SliceOutput per slice out. The only room that speaks both scheduler and model."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.layout import Integers, LayOut, Layout
from lora.segments import Segment, SegmentTable
from lora.store import Lease
from model.batch import ForwardBatch
from model.kv_cache import KVCache
from model.llama import Model
from model.sampling import InvalidLogits, Logprob, Sampled, SampleRow, prompt_logprobs, sample
from scheduler.plan import SequenceKey, Slice, SliceOutput, StepPlan, TokenLogprob


@dataclass(frozen=True, slots=True)
class StepOutputs:
    """A plan's outputs, aligned with its slices. `broken` are the sequences whose logits were no numbers, as an
    adapter with wild weights can make them: their outputs mean nothing, the others' are sound."""

    outputs: tuple[SliceOutput, ...]
    broken: tuple[SequenceKey, ...]


@dataclass(frozen=True, slots=True)
class Computed:
    """A plan that was computed when it was launched."""

    result: StepOutputs
    done: bool = True

    def outputs(self) -> StepOutputs:
        """See Computation."""
        return self.result


class Executor:
    """Runs plans on one device, one at a time."""

    def __init__(self, model: Model, cache: KVCache) -> None:
        self._model = model
        self._cache = cache
        self._lay_out = LayOut(cache.block_size)

    def launch(self, plan: StepPlan, lease: Lease) -> Computed:
        """See StepExecutor: the plan is computed when this returns."""
        return Computed(self.run(plan, lease))

    @torch.inference_mode()
    def run(self, plan: StepPlan, lease: Lease) -> StepOutputs:
        """Compute the plan's tokens; `lease` holds its adapters. Raises what the model raises."""
        layout = self._lay_out(plan)
        assert not layout.pending.size, "a plan that is computed at once leaves no token to be drawn"
        logits = self._model.forward(self._batch(layout, lease), self._cache)
        return _outputs(layout, logits)

    def _batch(self, layout: Layout, lease: Lease) -> ForwardBatch:
        return ForwardBatch(
            token_ids=self._send(layout.token_ids),
            positions=self._send(layout.positions),
            slots=self._send(layout.slots),
            query_lens=tuple(layout.query_lens.tolist()),
            context_lens=tuple(layout.context_lens.tolist()),
            block_tables=self._send(layout.tables),
            logit_rows=self._send(layout.logit_rows),
            segments=segments(layout, lease),
        )

    def _send(self, values: Integers) -> Tensor:
        return torch.from_numpy(values).to(self._cache.device)


def segments(layout: Layout, lease: Lease) -> SegmentTable:
    """The batch's rows by adapter."""
    return SegmentTable(
        tuple(Segment(run.start, run.stop, lease.weights[run.digest]) for run in layout.runs if run.digest)
    )


def _outputs(layout: Layout, logits: Tensor) -> StepOutputs:
    """Draw and score from the logits of the layout's rows."""
    after = np.cumsum(layout.scored + [part.samples for part in layout.slices])
    tokens, unsound = _sample(layout, logits, after - 1)
    prompts, unsound_prompts = _score_prompts(layout, logits, after)
    outputs: list[SliceOutput] = [SliceOutput(None)] * len(layout.slices)
    for i, place in enumerate(layout.places.tolist()):
        drawn = tokens.get(i)
        outputs[place] = SliceOutput(
            token_id=drawn.token_id if drawn else None,
            logprob=_told(drawn.logprob) if drawn and drawn.logprob else None,
            prompt_logprobs=prompts.get(i, ()),
        )
    broken = sorted({*unsound, *unsound_prompts}, key=lambda i: layout.places[i])
    return StepOutputs(tuple(outputs), tuple(layout.slices[i].key for i in broken))


def _sample(layout: Layout, logits: Tensor, rows: Integers) -> tuple[dict[int, Sampled], list[int]]:
    """The drawn tokens by slice of the layout, and the slices whose logits are no numbers. rows: [S], each slice's
    last row of logits."""
    samplers = list(layout.draws)
    broken: list[int] = []
    while samplers:
        chosen = (
            logits if len(samplers) == len(logits) else logits[rows[samplers].tolist()]
        )  # usually no copy
        try:
            drawn = sample(chosen, [_sample_row(layout.slices[i]) for i in samplers])
        except InvalidLogits as error:
            broken += [samplers[row] for row in error.rows]
            samplers = [i for row, i in enumerate(samplers) if row not in error.rows]
            continue
        return dict(zip(samplers, drawn, strict=True)), broken
    return {}, broken


def _score_prompts(
    layout: Layout, logits: Tensor, after: Integers
) -> tuple[dict[int, tuple[TokenLogprob, ...]], list[int]]:
    """Prompt log-probabilities by slice of the layout, and the slices whose logits are no numbers. after: [S], the row
    of logits that follows each slice's last."""
    scored: dict[int, tuple[TokenLogprob, ...]] = {}
    broken: list[int] = []
    for i in np.flatnonzero(layout.scored).tolist():
        part, count = layout.slices[i], int(layout.scored[i])
        first = int(after[i]) - part.samples - count
        following = part.request.prompt_token_ids[part.start + 1 : part.start + 1 + count]
        try:
            top = part.request.params.prompt_logprobs or 0
            entries = prompt_logprobs(logits[first : first + count], following, top)
        except InvalidLogits:
            broken.append(i)
        else:
            scored[i] = tuple(_told(entry) for entry in entries)
    return scored, broken


def _sample_row(part: Slice) -> SampleRow:
    request, params = part.request, part.request.params
    assert params.seed is not None, "a Request's seed is chosen when it is made"
    return SampleRow(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=params.logit_bias,
        seed=params.seed,
        stream=part.key.index,
        position=part.output_index,
        prompt_token_ids=request.prompt_token_ids if params.penalised else (),
        output_token_ids=part.output_token_ids,
        banned_token_ids=_banned(part),
        logprobs=params.logprobs,
    )


def _banned(part: Slice) -> tuple[int, ...]:
    """Below `min_tokens` no token may be drawn that would end the sequence."""
    params = part.request.params
    if part.output_index >= params.min_tokens:
        return ()
    return params.stop_token_ids + (() if params.ignore_eos else part.request.eos_token_ids)


def _told(entry: Logprob) -> TokenLogprob:
    return TokenLogprob(entry.token_id, entry.logprob, entry.rank, entry.top)
