"""The seam of the LoRA arithmetic: every implementation passes tests/conformance/test_lora_op.py."""

from typing import Protocol

from torch import Tensor

from lora.segments import SegmentTable
from lora.target_modules import SiteGroup


class LoraStep(Protocol):
    """One step's segments, planned; called for any layers and groups, in any order."""

    def add_lora(self, y: Tensor, x: Tensor, layer: int, group: SiteGroup) -> None:
        """Add y[t] += B (scale * (A x[t])) for every row t of every segment (Hu et al., LoRA, arXiv 2106.09685).

        y: [T, group's fused output], x: [T, in_features], both of the model's dtype and contiguous; the adapters
        may be of a wider dtype, and then the products are.
        For EMBEDDING x is the rows' token ids, [T] int64 below in_features, and A x[t] the column of A that one names.
        Rows of no segment are neither read nor written. Cost follows each segment's own rank.
        """
        ...


class LoraOp(Protocol):
    """Adds each segment's low-rank update to the base projection's output, in place."""

    def plan(self, table: SegmentTable) -> LoraStep:
        """Lay out once per step what all layers share. The table's adapters stay where they are until the step
        has run."""
        ...
