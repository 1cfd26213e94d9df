"""Sample and score a step's logits as its slices ask: the scheduler's values in and out, the sampler's between."""

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from engine.runner.base import StepOutputs
from engine.runner.input_batch import InputBatch, Integers
from engine.runner.token_masks import TokenMasks
from engine.structured.grammar import Words
from model.sampling.sample import InvalidLogits, Logprob, Sampled, SampleRow, prompt_logprobs, sample
from scheduler.plan import SequenceKey, Slice, SliceOutput, TokenLogprob


def sample_step(inputs: InputBatch, logits: Tensor, masks: TokenMasks) -> StepOutputs:
    """Sample and score from the logits [L, vocab] of a batch's logit rows; `masks` restricts some of its sequences."""
    after = np.cumsum(inputs.scored + [part.samples for part in inputs.slices])
    allowed, stuck = masks.of([inputs.slices[i] for i in inputs.sampling])
    tokens, invalid = _sample(inputs, logits, after - 1, allowed)
    prompts, invalid_prompts = _score_prompts(inputs, logits, after)
    outputs: list[SliceOutput] = [SliceOutput(None)] * len(inputs.slices)
    for i, place in enumerate(inputs.places.tolist()):
        drawn = tokens.get(i)
        outputs[place] = SliceOutput(
            token_id=drawn.token_id if drawn else None,
            logprob=_token_logprob(drawn.logprob) if drawn and drawn.logprob else None,
            prompt_logprobs=prompts.get(i, ()),
        )
    failed = sorted({*invalid, *invalid_prompts}, key=lambda i: inputs.places[i])
    return StepOutputs(tuple(outputs), tuple(inputs.slices[i].key for i in failed), stuck=stuck)


def _sample(
    inputs: InputBatch, logits: Tensor, rows: Integers, allowed: Mapping[SequenceKey, Words]
) -> tuple[dict[int, Sampled], list[int]]:
    """Draw tokens by slice of the batch, and find the slices whose logits are invalid.

    rows: [S], each slice's last row of logits; `allowed` are the tokens that sequences are restricted to.
    """
    samplers = list(inputs.sampling)
    invalid: list[int] = []
    while samplers:
        every = len(samplers) == len(logits)  # as usual: then nothing is copied
        chosen = logits if every else logits[rows[samplers].tolist()]
        try:
            drawn = sample(chosen, [sample_row(inputs.slices[i], allowed) for i in samplers])
        except InvalidLogits as error:
            invalid += [samplers[row] for row in error.rows]
            samplers = [i for row, i in enumerate(samplers) if row not in error.rows]
            continue
        return dict(zip(samplers, drawn, strict=True)), invalid
    return {}, invalid


def _score_prompts(
    inputs: InputBatch, logits: Tensor, after: Integers
) -> tuple[dict[int, tuple[TokenLogprob, ...]], list[int]]:
    """Compute prompt log-probabilities by slice of the batch, and find the slices whose logits are invalid.

    after: [S], the row of logits that follows each slice's last.
    """
    scored: dict[int, tuple[TokenLogprob, ...]] = {}
    invalid: list[int] = []
    slices: list[int] = np.flatnonzero(inputs.scored).tolist()
    for i in slices:
        part, count = inputs.slices[i], int(inputs.scored[i])
        first = int(after[i]) - part.samples - count
        following = part.request.prompt_token_ids[part.start + 1 : part.start + 1 + count]
        try:
            top = part.request.params.prompt_logprobs or 0
            entries = prompt_logprobs(logits[first : first + count], following, top)
        except InvalidLogits:
            invalid.append(i)
        else:
            scored[i] = tuple(_token_logprob(entry) for entry in entries)
    return scored, invalid


def sample_row(part: Slice, allowed: Mapping[SequenceKey, Words]) -> SampleRow:
    """Make the parameters by which the slice's token is drawn; `allowed` as TokenMasks.of returns it."""
    words = allowed.get(part.key)
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
        stream=part.request.stream + part.key.index,
        position=part.output_index,
        prompt_token_ids=request.prompt_token_ids if params.reads_output else (),
        output_token_ids=part.output_token_ids,
        banned_token_ids=_banned(part) if words is None else (),
        logprobs=params.logprobs,
        processed=params.logprobs_mode == "processed_logprobs",
        allowed=words,
    )


def _banned(part: Slice) -> tuple[int, ...]:
    """Return the tokens that may not be drawn: below `min_tokens`, those that would end the sequence."""
    params = part.request.params
    if part.output_index >= params.min_tokens:
        return ()
    return params.stop_token_ids + (() if params.ignore_eos else part.request.eos_token_ids)


def _token_logprob(entry: Logprob) -> TokenLogprob:
    return TokenLogprob(entry.token_id, entry.logprob, entry.rank, entry.top)
