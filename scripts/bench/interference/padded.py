"""Show what padding costs: an executor whose adapters all have the rank of the step's largest.

It stands for kernels that take one rank for a whole batch (Punica's BGMV, vLLM). The arithmetic is the
engine's own, over matrices to which rows of zeros were added beforehand. So answers stay the same, and the
padded copies cost no time in a step. All that differs is the rank that the kernels work with.
"""

from dataclasses import replace

import torch
from torch import Tensor

from engine.runner.base import Computation, StepExecutor
from lora.segments import AdapterLease, AdapterWeights, GroupWeights, SitePart
from scheduler.plan import StepPlan


class PaddedExecutor:
    """StepExecutor over another."""

    def __init__(self, executor: StepExecutor) -> None:
        self._executor = executor
        self._padded: dict[tuple[str, int], AdapterWeights] = {}

    def launch(self, plan: StepPlan, lease: AdapterLease) -> Computation:
        """See StepExecutor."""
        largest = max((ref.rank for ref in plan.adapters), default=0)
        weights = {digest: self._pad(each, largest) for digest, each in lease.weights.items()}
        return self._executor.launch(plan, AdapterLease(weights, lambda: None))

    def _pad(self, weights: AdapterWeights, rank: int) -> AdapterWeights:
        key = weights.digest, rank
        if key not in self._padded:
            groups = {place: pad(group, rank) for place, group in weights.groups.items()}
            self._padded[key] = AdapterWeights(f"{weights.digest}/{rank}", groups)
        return self._padded[key]


def pad(group: GroupWeights, rank: int) -> GroupWeights:
    """Widen every site to that rank; the update stays the same."""
    inputs = group.A.shape[1]
    matrices, scales, parts = list[Tensor](), list[Tensor](), list[SitePart]()
    for number, part in enumerate(group.parts):
        rows = slice(part.rank_start, part.rank_stop)
        matrices.append(_longer(group.A[rows], rank))
        scales.append(_longer(group.scale[rows], rank))
        start, stop = number * rank, (number + 1) * rank
        parts.append(replace(part, rank_start=start, rank_stop=stop, Bt=_longer(part.Bt, rank)))
    assert all(matrix.shape == (rank, inputs) for matrix in matrices)
    return GroupWeights(torch.cat(matrices), torch.cat(scales), tuple(parts))


def _longer(rows: Tensor, count: int) -> Tensor:
    """With rows of zeros up to `count`."""
    return torch.cat([rows, rows.new_zeros(count - rows.shape[0], *rows.shape[1:])])
