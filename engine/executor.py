"""Executor: one StepPlan in, one SliceOutput per slice out. The only room that speaks both scheduler and model."""

from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from lora.segments import NO_SEGMENTS, Segment, SegmentTable
from lora.store import Lease
from model.batch import ForwardBatch
from model.kv_cache import KVCache
from model.llama import Llama
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


@dataclass(frozen=True, slots=True)
class _Part:
    """A slice in its place in the batch: its first row, and the first of its rows of logits.

    Those are one for each prompt token whose log-probability is wanted, then one to sample from.
    """

    position: int  # in plan.slices
    slice: Slice
    first_row: int
    first_logits: int

    @property
    def predicted(self) -> int:
        """How many rows, from the first, predict a prompt token whose log-probability is wanted."""
        if not self.slice.prompt_logprobs:
            return 0
        left = len(self.slice.request.prompt_token_ids) - 1 - self.slice.start
        return max(0, min(len(self.slice.token_ids), left))

    @property
    def logit_rows(self) -> list[int]:
        """The batch rows whose logits are wanted."""
        rows = list(range(self.first_row, self.first_row + self.predicted))
        return [*rows, self.first_row + len(self.slice.token_ids) - 1] if self.slice.samples else rows

    @property
    def sample_logits(self) -> int:
        """The row of logits to draw from."""
        return self.first_logits + self.predicted


class Executor:
    """Runs plans on one device, one at a time."""

    def __init__(self, model: Llama, cache: KVCache) -> None:
        self._model = model
        self._cache = cache

    def launch(self, plan: StepPlan, lease: Lease) -> Computed:
        """See StepExecutor: the plan is computed when this returns."""
        return Computed(self.run(plan, lease))

    @torch.inference_mode()
    def run(self, plan: StepPlan, lease: Lease) -> StepOutputs:
        """Compute the plan's tokens; `lease` holds its adapters. Raises what the model raises."""
        parts = _lay_out(plan)
        logits = self._model.forward(self._batch(parts, lease), self._cache)
        tokens, unsound = _sample(parts, logits)
        prompts, unsound_prompts = _score_prompts(parts, logits)
        outputs: list[SliceOutput] = [SliceOutput(None)] * len(parts)
        for part in parts:
            drawn = tokens.get(part.position)
            outputs[part.position] = SliceOutput(
                token_id=drawn.token_id if drawn else None,
                logprob=_told(drawn.logprob) if drawn and drawn.logprob else None,
                prompt_logprobs=prompts.get(part.position, ()),
            )
        broken = sorted({*unsound, *unsound_prompts})
        return StepOutputs(tuple(outputs), tuple(plan.slices[position].key for position in broken))

    def _batch(self, parts: list[_Part], lease: Lease) -> ForwardBatch:
        slices = [part.slice for part in parts]
        tables = _block_tables(slices)
        query_lens = [len(each.token_ids) for each in slices]
        positions = np.concatenate(
            [np.arange(each.start, each.start + len(each.token_ids)) for each in slices]
        )
        sequence = np.repeat(np.arange(len(slices)), query_lens)
        size = self._cache.block_size
        return ForwardBatch(
            token_ids=self._send(list(chain.from_iterable(each.token_ids for each in slices))),
            positions=self._send(positions),
            slots=self._send(tables[sequence, positions // size] * size + positions % size),
            query_lens=tuple(query_lens),
            context_lens=tuple(each.start + len(each.token_ids) for each in slices),
            block_tables=self._send(tables),
            logit_rows=self._send(list(chain.from_iterable(part.logit_rows for part in parts))),
            segments=_segments(parts, lease),
        )

    def _send(self, values: list[int] | np.ndarray) -> Tensor:
        return torch.from_numpy(np.asarray(values, dtype=np.int64)).to(self._cache.device)


def _lay_out(plan: StepPlan) -> list[_Part]:
    """The slices in batch order: the base's first, then each adapter's together, so that its GEMMs run once."""
    turn = {"": 0} | {ref.digest: number for number, ref in enumerate(plan.adapters, start=1)}
    order = sorted(range(len(plan.slices)), key=lambda i: turn[plan.slices[i].adapter.digest])
    parts: list[_Part] = []
    row = logits = 0
    for position in order:
        part = _Part(position, plan.slices[position], row, logits)
        parts.append(part)
        row += len(part.slice.token_ids)
        logits += part.predicted + part.slice.samples
    return parts


def _block_tables(slices: list[Slice]) -> np.ndarray:
    """[S, widest] int64, padded with block 0, which no row's context reaches."""
    widest = max(len(each.block_table) for each in slices)
    tables = np.zeros((len(slices), widest), dtype=np.int64)
    for row, each in enumerate(slices):
        tables[row, : len(each.block_table)] = each.block_table
    return tables


def _segments(parts: list[_Part], lease: Lease) -> SegmentTable:
    segments: list[Segment] = []
    for part in parts:
        digest = part.slice.adapter.digest
        if part.slice.adapter.is_base:
            continue
        start, stop = part.first_row, part.first_row + len(part.slice.token_ids)
        if segments and segments[-1].adapter.digest == digest:
            start = segments.pop().start
        segments.append(Segment(start, stop, lease.weights[digest]))
    return SegmentTable(tuple(segments)) if segments else NO_SEGMENTS


def _sample(parts: list[_Part], logits: Tensor) -> tuple[dict[int, Sampled], list[int]]:
    """The drawn tokens by position in the plan, and the positions of slices whose logits are no numbers."""
    samplers = [part for part in parts if part.slice.samples]
    broken: list[int] = []
    while samplers:
        rows = [part.sample_logits for part in samplers]
        chosen = logits if len(rows) == len(logits) else logits[rows]  # the usual step copies nothing
        try:
            drawn = sample(chosen, [_sample_row(part.slice) for part in samplers])
        except InvalidLogits as error:
            broken += [samplers[row].position for row in error.rows]
            samplers = [part for row, part in enumerate(samplers) if row not in error.rows]
            continue
        return {part.position: token for part, token in zip(samplers, drawn, strict=True)}, broken
    return {}, broken


def _score_prompts(
    parts: list[_Part], logits: Tensor
) -> tuple[dict[int, tuple[TokenLogprob, ...]], list[int]]:
    """Prompt log-probabilities by position in the plan, and the positions of slices whose logits are no numbers."""
    scored: dict[int, tuple[TokenLogprob, ...]] = {}
    broken: list[int] = []
    for part in parts:
        if not part.predicted:
            continue
        request, start = part.slice.request, part.slice.start
        following = request.prompt_token_ids[start + 1 : start + 1 + part.predicted]
        rows = logits[part.first_logits : part.first_logits + part.predicted]
        try:
            entries = prompt_logprobs(rows, following, request.params.prompt_logprobs or 0)
        except InvalidLogits:
            broken.append(part.position)
        else:
            scored[part.position] = tuple(_told(entry) for entry in entries)
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
