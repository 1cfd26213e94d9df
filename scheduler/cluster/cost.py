"""What a step costs: a linear model of step seconds, one per node type and kernel kind.

    step_s = base + a·prefill tokens + b·decode sequences + c·context tokens + d·rank rows + e·token ranks

Rank rows are Σ rank over the step's distinct adapters (their weights are read once a step), token ranks Σ
tokens·rank (their arithmetic). How large a rank counts depends on the kernels, see `Kernel`. The model does
not know where its coefficients come from (`fit`, or a profile that was derived) nor whether the step is real
or simulated.
"""

from dataclasses import dataclass
from enum import Enum


class Kernel(Enum):
    """How large a kernel takes each adapter's rank to be.

    EXACT: its own (this engine). PADDED: the largest of the batch (Punica's BGMV, vLLM). MULTI_RANK: its own
    where one token is decoded, the largest of the batch where a prompt is read (S-LoRA's MBGMV and MBGMM).
    """

    EXACT = "exact"
    PADDED = "padded"
    MULTI_RANK = "multi-rank"


@dataclass(frozen=True, slots=True)
class AdapterLoad:
    """One adapter's part of a step: its rank (0 for the base model), prompt tokens, and sequences
    decoding."""

    rank: int
    prefill_tokens: int
    decode_sequences: int


@dataclass(frozen=True, slots=True)
class StepLoad:
    """A step's work: one entry for each distinct adapter, and the tokens of K/V that its attention reads."""

    adapters: tuple[AdapterLoad, ...]
    context_tokens: int


Features = tuple[float, float, float, float, float, float]


def features(load: StepLoad, kernel: Kernel) -> Features:
    """(1, prefill tokens, decode sequences, context tokens, rank rows, token ranks) of a step."""
    largest = max((part.rank for part in load.adapters), default=0)
    prefill = decode = rank_rows = token_ranks = 0
    for part in load.adapters:
        prefill += part.prefill_tokens
        decode += part.decode_sequences
        if part.rank == 0:
            continue
        decode_rank = largest if kernel is Kernel.PADDED else part.rank
        prefill_rank = part.rank if kernel is Kernel.EXACT else largest
        rank_rows += prefill_rank if part.prefill_tokens else decode_rank
        token_ranks += part.prefill_tokens * prefill_rank + part.decode_sequences * decode_rank
    return (
        1.0,
        float(prefill),
        float(decode),
        float(load.context_tokens),
        float(rank_rows),
        float(token_ranks),
    )


@dataclass(frozen=True, slots=True)
class CostModel:
    """Non-negative seconds: of any step, and per unit of each feature."""

    kernel: Kernel
    base_s: float
    prefill_token_s: float
    decode_sequence_s: float
    context_token_s: float
    rank_row_s: float
    token_rank_s: float

    def __post_init__(self) -> None:
        if min(self.coefficients) < 0:
            raise ValueError(f"coefficients={self.coefficients}: give seconds of 0 or more")

    @property
    def coefficients(self) -> Features:
        """In the order of `features`."""
        return (
            self.base_s,
            self.prefill_token_s,
            self.decode_sequence_s,
            self.context_token_s,
            self.rank_row_s,
            self.token_rank_s,
        )

    def step_s(self, load: StepLoad) -> float:
        """Predicted seconds of one step."""
        return sum(a * b for a, b in zip(self.coefficients, features(load, self.kernel), strict=True))
