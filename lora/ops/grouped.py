"""The LoRA arithmetic segment by segment in plain torch: runs on any device, needs no compiler.

Adapters may be wider than the model. On a CPU, a product of one row costs 15 to 25 us a call in bfloat16, whatever
its size, and 2 to 4 us in float32. That more than makes up for reading twice the bytes.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import linear

from lora.segments import SegmentTable
from lora.target_modules import SiteGroup


class GroupedLora:
    """Per segment one GEMM shrinks with the group's stacked A, then one GEMM per site expands in place."""

    def plan(self, table: SegmentTable) -> "GroupedStep":
        """See LoraOp."""
        return GroupedStep(table)


@dataclass(frozen=True, slots=True)
class GroupedStep:
    """LoraStep over one step's segments."""

    table: SegmentTable

    def add_lora(self, y: Tensor, x: Tensor, layer: int, group: SiteGroup) -> None:
        """As LoraStep.add_lora; the products are in the adapter's dtype, or float32 where that is of a byte, and the
        sum is rounded to y's."""
        key = (layer, group)
        for segment in self.table.segments:
            weights = segment.adapter.groups.get(key)
            if weights is None:
                continue
            start, stop = segment.start, segment.stop
            narrow = weights.A.dtype.itemsize == 1
            if group is SiteGroup.EMBEDDING:
                h = weights.A.index_select(1, x[start:stop]).t().contiguous()
                h = h.float() if narrow else h
            else:
                A = weights.A.float() if narrow else weights.A
                h = linear(x[start:stop].to(A.dtype), A)
            h.mul_(weights.scale)
            wide = h.dtype != y.dtype
            for part in weights.parts:
                columns = y[start:stop, part.out_start : part.out_stop]
                shrunk = h[:, part.rank_start : part.rank_stop]
                Bt = part.Bt.float() if narrow else part.Bt
                if wide:
                    columns.add_(shrunk.mm(Bt))
                else:
                    columns.addmm_(shrunk, Bt)
