"""Draws: what the slices of a layout ask to be drawn and scored, and what came of it. Sampling's words on one side, the
scheduler's on the other."""

import numpy as np
from torch import Tensor

from engine.runner.base import StepOutputs
from engine.runner.input_batch import InputBatch, Integers
from model.sampling.sample import InvalidLogits, Logprob, Sampled, SampleRow, prompt_logprobs, sample
from scheduler.plan import Slice, SliceOutput, TokenLogprob


def draw(layout: InputBatch, logits: Tensor) -> StepOutputs:
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


def _sample(layout: InputBatch, logits: Tensor, rows: Integers) -> tuple[dict[int, Sampled], list[int]]:
    """The drawn tokens by slice of the layout, and the slices whose logits are no numbers. rows: [S], each slice's
    last row of logits."""
    samplers = list(layout.draws)
    broken: list[int] = []
    while samplers:
        every = len(samplers) == len(logits)  # as usual: then nothing is copied
        chosen = logits if every else logits[rows[samplers].tolist()]
        try:
            drawn = sample(chosen, [sample_row(layout.slices[i]) for i in samplers])
        except InvalidLogits as error:
            broken += [samplers[row] for row in error.rows]
            samplers = [i for row, i in enumerate(samplers) if row not in error.rows]
            continue
        return dict(zip(samplers, drawn, strict=True)), broken
    return {}, broken


def _score_prompts(
    layout: InputBatch, logits: Tensor, after: Integers
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


def sample_row(part: Slice) -> SampleRow:
    """How the slice's token is to be drawn."""
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
