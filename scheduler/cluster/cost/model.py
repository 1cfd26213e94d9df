"""What a step costs: a linear model of step seconds, one per node type and kernel kind.

    step_s = base + a·prefill tokens + b·decode sequences + c·context tokens + d·rank rows + e·token ranks
           + f·adapters + g·adapter tokens + h·prompt pairs + i·max(0, rows - knee)

Rank rows are Σ rank over the step's distinct adapters (their weights are read once a step), token ranks Σ
tokens·rank (their arithmetic). How large a rank counts depends on the kernels, see `Kernel`. The second line
is what a measured node may need and a derived profile leaves at 0: calls for each distinct adapter, and work
for each of its tokens, whatever their ranks; attention within prompts, which grows with their square; and
the rows (prompt tokens and decoding sequences) beyond the knee of the roofline, below which reading the
weights hides the arithmetic. The model does not know where its coefficients come from (`fit`, or a profile
that was derived) nor whether the step is real or simulated.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

from lora.adapter import AdapterRef
from scheduler.plan import StepPlan

_FIXED_REMEDY = "give the largest rank that the server takes to fixed kernels, and 0 to others"


class Kernel(Enum):
    """How large a kernel takes each adapter's rank to be.

    EXACT: its own (this engine). PADDED: the largest of the batch (Punica's BGMV). MULTI_RANK: its own where
    one token is decoded, the largest of the batch where a prompt is read (S-LoRA's MBGMV and MBGMM). FIXED: the
    largest that the server takes, whatever is in the batch (vLLM's max_lora_rank).
    """

    EXACT = "exact"
    PADDED = "padded"
    MULTI_RANK = "multi-rank"
    FIXED = "fixed"

    @property
    def mixes(self) -> bool:
        """Return whether what an adapter costs depends on the others in the batch."""
        return self in (Kernel.PADDED, Kernel.MULTI_RANK)


@dataclass(frozen=True, slots=True)
class AdapterLoad:
    """One adapter's part of a step: its rank (0 for the base model), prompt tokens, and sequences
    decoding."""

    rank: int
    prefill_tokens: int
    decode_sequences: int


@dataclass(frozen=True, slots=True)
class StepLoad:
    """A step's work: one entry for each distinct adapter, and what its attention reads.

    `context_tokens` are the tokens of K/V, `prompt_pairs` the (prompt token, token attended to) pairs of
    prompts.
    """

    adapters: tuple[AdapterLoad, ...]
    context_tokens: int
    prompt_pairs: int = 0


Features = tuple[float, float, float, float, float, float, float, float, float, float]


def features(load: StepLoad, kernel: Kernel, knee_rows: float = 0.0, fixed_rank: int = 0) -> Features:
    """Return what a step is charged for, in the order of `CostModel.coefficients`.

    `fixed_rank` is what FIXED kernels take every rank to be.
    """
    fixed = kernel is Kernel.FIXED
    largest = fixed_rank if fixed else max((part.rank for part in load.adapters), default=0)
    prefill = decode = rank_rows = token_ranks = adapters = adapter_tokens = 0
    for part in load.adapters:
        prompt, drawn, rank = part.prefill_tokens, part.decode_sequences, part.rank
        prefill += prompt
        decode += drawn
        if rank == 0:
            continue
        decode_rank = largest if fixed or kernel is Kernel.PADDED else rank
        prefill_rank = rank if kernel is Kernel.EXACT else largest
        adapters += 1
        adapter_tokens += prompt + drawn
        rank_rows += prefill_rank if prompt else decode_rank
        token_ranks += prompt * prefill_rank + drawn * decode_rank
    return (
        1.0,
        prefill,
        decode,
        load.context_tokens,
        rank_rows,
        token_ranks,
        adapters,
        adapter_tokens,
        load.prompt_pairs,
        max(0.0, prefill + decode - knee_rows),
    )


@dataclass(frozen=True, slots=True)
class CostModel:
    """Non-negative seconds: of any step, and per unit of each feature. `crowded_row_s` is for each row beyond
    `knee_rows`. `fixed_rank` is what FIXED kernels take every rank to be, and 0 for the others."""

    kernel: Kernel
    base_s: float
    prefill_token_s: float
    decode_sequence_s: float
    context_token_s: float
    rank_row_s: float
    token_rank_s: float
    adapter_s: float = 0.0
    adapter_token_s: float = 0.0
    prompt_pair_s: float = 0.0
    crowded_row_s: float = 0.0
    knee_rows: float = 0.0
    fixed_rank: int = 0

    def __post_init__(self) -> None:
        if min(*self.coefficients, self.knee_rows) < 0:
            raise ValueError(f"{self}: give seconds and rows of 0 or more")
        if (self.kernel is Kernel.FIXED) != (self.fixed_rank > 0):
            raise ValueError(
                f"fixed_rank={self.fixed_rank} under {self.kernel.value} kernels: {_FIXED_REMEDY}"
            )

    @property
    def coefficients(self) -> Features:
        """Return the seconds of base, prefill tokens, decode sequences, context tokens, rank rows, token
        ranks, adapters, adapter tokens, prompt pairs and crowded rows."""
        return (
            self.base_s,
            self.prefill_token_s,
            self.decode_sequence_s,
            self.context_token_s,
            self.rank_row_s,
            self.token_rank_s,
            self.adapter_s,
            self.adapter_token_s,
            self.prompt_pair_s,
            self.crowded_row_s,
        )

    def charged_rank(self, rank: float) -> float:
        """Return how large `rank` counts where no other rank is in the batch."""
        return self.fixed_rank if self.kernel is Kernel.FIXED and rank > 0 else rank

    def under(self, kernel: Kernel, fixed_rank: int = 0) -> "CostModel":
        """Return the model of other kernels with the same coefficients; `fixed_rank` is for FIXED ones."""
        return replace(self, kernel=kernel, fixed_rank=fixed_rank if kernel is Kernel.FIXED else 0)

    def step_s(self, load: StepLoad) -> float:
        """Predict the seconds of one step."""
        charged = features(load, self.kernel, self.knee_rows, self.fixed_rank)
        return sum(a * b for a, b in zip(self.coefficients, charged, strict=True))


def by_kernel(models: Sequence[CostModel]) -> dict[Kernel, CostModel]:
    """Return a model of each kernel: those given, that of the first one's kernel in front.

    Kernels that none is given of cost what the first says. What rank FIXED ones take is not known then, so they
    are left out.
    """
    given = {models[0].kernel: models[0]} | {model.kernel: model for model in reversed(models)}
    return given | {
        kernel: models[0].under(kernel)
        for kernel in Kernel
        if kernel is not Kernel.FIXED and kernel not in given
    }


def load_of(plan: StepPlan) -> StepLoad:
    """Return the plan's load: rows that continue a drawn sequence decode, the rest read prompts."""
    prompts: dict[AdapterRef, int] = {}
    decoding: dict[AdapterRef, int] = {}
    context = pairs = 0
    for part in plan.slices:
        ref, rows = part.adapter, len(part.token_ids)
        context += part.start + rows
        if rows == 1 and part.output_index > 0:
            decoding[ref] = decoding.get(ref, 0) + 1
        else:
            prompts[ref] = prompts.get(ref, 0) + rows
            pairs += rows * part.start + rows * (rows + 1) // 2
    refs = dict.fromkeys((*prompts, *decoding))
    parts = (AdapterLoad(ref.rank, prompts.get(ref, 0), decoding.get(ref, 0)) for ref in refs)
    return StepLoad(tuple(parts), context, pairs)
