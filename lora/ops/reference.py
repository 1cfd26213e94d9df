"""The LoRA arithmetic as one reads it in the paper, row by row in float32: the oracle of every other op."""

from dataclasses import dataclass

from torch import Tensor

from lora.segments import SegmentTable
from lora.target_modules import SiteGroup


class ReferenceLora:
    """y[t] += B (scale * (A x[t])), one row and one site at a time (Hu et al., LoRA, arXiv 2106.09685)."""

    def plan(self, table: SegmentTable) -> "ReferenceStep":
        """See LoraOp."""
        return ReferenceStep(table)


@dataclass(frozen=True, slots=True)
class ReferenceStep:
    """LoraStep by the equation."""

    table: SegmentTable

    def add_lora(self, y: Tensor, x: Tensor, layer: int, group: SiteGroup) -> None:
        """As LoraStep.add_lora; the sum is rounded to y's dtype once."""
        for segment in self.table.segments:
            weights = segment.adapter.groups.get((layer, group))
            if weights is None:
                continue
            for t in range(segment.start, segment.stop):
                column = (
                    weights.A[:, x[t]] if group is SiteGroup.EMBEDDING else weights.A.float() @ x[t].float()
                )
                h = weights.scale * column.float()
                for part in weights.parts:
                    delta = h[part.rank_start : part.rank_stop] @ part.Bt.float()
                    columns = y[t, part.out_start : part.out_stop]
                    columns.copy_(columns.float() + delta)
