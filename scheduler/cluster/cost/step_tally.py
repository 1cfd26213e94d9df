"""The parts of many steps' seconds under every kind of kernel at once, for whoever compares kinds.

`features` says the same of one step under one kind; here one pass over a step's adapters is enough for all
kinds, and the rest is done for many steps together.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from scheduler.cluster.cost.model import CostModel, Kernel, StepLoad

Floats = NDArray[np.float64]

Tally = tuple[int, ...]
"""Prompt tokens, decode sequences, context tokens and prompt pairs; then of the adapters: their number, prompt
tokens, decode sequences, Σ rank, Σ prompt tokens·rank, Σ decode sequences·rank, the largest rank; and of those
that read prompts: their number and Σ rank."""

_FIXED, _PROMPT, _LORA = 0, 1, 2
_PART_OF = (_FIXED, _PROMPT, _FIXED, _FIXED, _LORA, _LORA, _LORA, _LORA, _PROMPT, _PROMPT)  # as `Pace` says


def tally(load: StepLoad) -> Tally:
    """Count all that any kind of kernel charges a step for."""
    prefill = decode = adapters = prompts = drawn = ranks = largest = 0
    prompt_ranks = drawn_ranks = reading = reading_ranks = 0
    for part in load.adapters:
        rank, prompt, sequences = part.rank, part.prefill_tokens, part.decode_sequences
        prefill += prompt
        decode += sequences
        if not rank:
            continue
        adapters += 1
        ranks += rank
        drawn += sequences
        drawn_ranks += sequences * rank
        if rank > largest:
            largest = rank
        if prompt:
            prompts += prompt
            prompt_ranks += prompt * rank
            reading += 1
            reading_ranks += rank
    return (
        *(prefill, decode, load.context_tokens, load.prompt_pairs),
        *(adapters, prompts, drawn, ranks, prompt_ranks, drawn_ranks, largest),
        *(reading, reading_ranks),
    )


class StepParts:
    """Works out the fixed, prompt and LoRA seconds of steps under each of `models`."""

    def __init__(self, models: Sequence[CostModel]) -> None:
        self._models = tuple(models)
        self._coefficients: Floats = np.array([model.coefficients for model in models])
        self._into_parts: Floats = np.zeros((len(_PART_OF), 3))
        self._into_parts[range(len(_PART_OF)), _PART_OF] = 1.0

    def of(self, tallies: Sequence[Tally]) -> Floats:
        """Return [models, steps, parts] seconds."""
        counts: Floats = np.array(tallies, dtype=np.float64).T
        prefill, decode, context, pairs, adapters, prompts, drawn = counts[:7]
        charged: Floats = np.empty((len(self._models), counts.shape[1], len(_PART_OF)))
        for model, rows in zip(self._models, charged, strict=True):
            rank_rows, token_ranks = _rank_work(counts, model)
            crowded = np.maximum(prefill + decode - model.knee_rows, 0.0)
            shared = (
                prefill,
                decode,
                context,
                rank_rows,
                token_ranks,
                adapters,
                prompts + drawn,
                pairs,
                crowded,
            )
            rows[:, 0] = 1.0
            rows[:, 1:] = np.stack(shared, axis=1)
        return (charged * self._coefficients[:, None, :]) @ self._into_parts


def _rank_work(counts: Floats, model: CostModel) -> tuple[Floats, Floats]:
    """Return [steps] rank rows and token ranks."""
    adapters, prompts, drawn, ranks, prompt_ranks, drawn_ranks, largest, reading, reading_ranks = counts[4:]
    match model.kernel:
        case Kernel.EXACT:
            return ranks, prompt_ranks + drawn_ranks
        case Kernel.PADDED:
            return adapters * largest, (prompts + drawn) * largest
        case Kernel.MULTI_RANK:
            return reading * largest + ranks - reading_ranks, prompts * largest + drawn_ranks
