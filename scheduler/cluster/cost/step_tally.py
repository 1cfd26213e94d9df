"""The parts of many steps' seconds under every kind of kernel at once, for whoever compares kinds.

`features` says the same of one step under one kind; here one pass over a step's adapters is enough for all
kinds, and the rest is done for many steps together.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from scheduler.cluster.cost.model import CostModel, Kernel, StepLoad

Floats = NDArray[np.float64]

Tally = tuple[float, ...]
"""One step's counts: those of `_COUNTS`, then its rows beyond each knee that there is."""

_COUNTS = (
    *("steps", "prefill", "decode", "context", "pairs", "adapters", "adapter_tokens"),
    *("ranks", "padded_ranks", "multi_ranks", "token_ranks", "padded_token_ranks", "multi_token_ranks"),
)
_RANK_WORK = {  # what rank rows and token ranks are for each kind of kernel, FIXED ones for each rank of theirs
    Kernel.EXACT: ("ranks", "token_ranks"),
    Kernel.PADDED: ("padded_ranks", "padded_token_ranks"),
    Kernel.MULTI_RANK: ("multi_ranks", "multi_token_ranks"),
    Kernel.FIXED: ("adapters", "adapter_tokens"),
}
_FIXED, _PROMPT, _LORA = 0, 1, 2  # as in `Pace`


class StepParts:
    """Works out the fixed, prompt and LoRA seconds of steps under each of `models`."""

    def __init__(self, models: Sequence[CostModel]) -> None:
        self._knees = tuple(dict.fromkeys(model.knee_rows for model in models))
        self._models = len(models)
        weights: Floats = np.zeros((len(_COUNTS) + len(self._knees), len(models), 3))
        for at, model in enumerate(models):
            for count, part, seconds in _charges(model):
                weights[_COUNTS.index(count), at, part] += seconds
            weights[len(_COUNTS) + self._knees.index(model.knee_rows), at, _PROMPT] = model.crowded_row_s
        self._weights = weights.reshape(len(weights), -1)

    def tally(self, load: StepLoad) -> Tally:
        """Count all that any of the models charges a step for."""
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
        rows, tokens = prefill + decode, prompts + drawn
        return (
            *(1, prefill, decode, load.context_tokens, load.prompt_pairs, adapters, tokens),
            *(ranks, adapters * largest, reading * largest + ranks - reading_ranks),
            *(prompt_ranks + drawn_ranks, tokens * largest, prompts * largest + drawn_ranks),
            *[max(0, rows - knee) for knee in self._knees],
        )

    def of(self, tallies: Sequence[Tally]) -> Floats:
        """Return [models, steps, parts] seconds."""
        parts: Floats = np.array(tallies, dtype=np.float64) @ self._weights
        return parts.reshape(len(tallies), self._models, 3).transpose(1, 0, 2)


def _charges(model: CostModel) -> tuple[tuple[str, int, float], ...]:
    """List what is counted, the part of the seconds that it makes, and how many."""
    rank_rows, token_ranks = _RANK_WORK[model.kernel]
    each = model.fixed_rank or 1
    return (
        ("steps", _FIXED, model.base_s),
        ("decode", _FIXED, model.decode_sequence_s),
        ("context", _FIXED, model.context_token_s),
        ("prefill", _PROMPT, model.prefill_token_s),
        ("pairs", _PROMPT, model.prompt_pair_s),
        (rank_rows, _LORA, model.rank_row_s * each),
        (token_ranks, _LORA, model.token_rank_s * each),
        ("adapters", _LORA, model.adapter_s),
        ("adapter_tokens", _LORA, model.adapter_token_s),
    )
