"""How far a node is from what its profile says: a factor on each part of the seconds of a step.

A step's seconds have three parts that go wrong separately:

    fixed    what every step and every sequence that decodes takes: base, decode sequences, context tokens
    prompt   what reading prompts takes: prefill tokens, prompt pairs, rows beyond the knee
    lora     what adapters take: rank rows, token ranks, adapters, adapter tokens

It does not know who finds the factors, nor on what.
"""

import math
from dataclasses import dataclass, replace

from scheduler.cluster.cost.model import CostModel

_ROUNDED = math.log(1.05)  # paces are told apart to about 5 %


@dataclass(frozen=True, slots=True)
class Pace:
    """How many times longer each part of a node's steps takes than its profile says."""

    fixed: float = 1.0
    prompt: float = 1.0
    lora: float = 1.0

    def __post_init__(self) -> None:
        if not all(0 < factor < math.inf for factor in (self.fixed, self.prompt, self.lora)):
            raise ValueError(f"{self}: give factors above 0")

    def rounded(self) -> "Pace":
        """Return the nearest of few paces, so that what follows from each can be kept."""
        return Pace(_rounded(self.fixed), _rounded(self.prompt), _rounded(self.lora))

    def of(self, model: CostModel) -> CostModel:
        """Return the cost model of a node that is at this pace where `model` says what its profile does."""
        return replace(
            model,
            base_s=model.base_s * self.fixed,
            decode_sequence_s=model.decode_sequence_s * self.fixed,
            context_token_s=model.context_token_s * self.fixed,
            prefill_token_s=model.prefill_token_s * self.prompt,
            prompt_pair_s=model.prompt_pair_s * self.prompt,
            crowded_row_s=model.crowded_row_s * self.prompt,
            rank_row_s=model.rank_row_s * self.lora,
            token_rank_s=model.token_rank_s * self.lora,
            adapter_s=model.adapter_s * self.lora,
            adapter_token_s=model.adapter_token_s * self.lora,
        )


AS_PROFILED = Pace()


def _rounded(factor: float) -> float:
    return math.exp(round(math.log(factor) / _ROUNDED) * _ROUNDED)
