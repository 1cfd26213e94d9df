"""The LoRA arithmetic segment by segment in plain torch: runs on any device, needs no compiler.

Measured on one AVX512_BF16 core, the spellings of one segment's products (mm, linear, mv, alpha instead of
scaling) differ by 10 to 20 %; what a step of a small model pays is the number of calls, so there are few.
"""

from torch import Tensor
from torch.nn.functional import linear

from lora.segments import SegmentTable
from lora.sites import SiteGroup


class GroupedLora:
    """Per segment one GEMM shrinks with the group's stacked A, then one GEMM per site expands in place."""

    def add_lora(self, y: Tensor, x: Tensor, table: SegmentTable, layer: int, group: SiteGroup) -> None:
        """As LoraOp.add_lora; h is rounded to the model's dtype between the two GEMMs."""
        key = (layer, group)
        for segment in table.segments:
            weights = segment.adapter.groups.get(key)
            if weights is None:
                continue
            start, stop = segment.start, segment.stop
            h = linear(x[start:stop], weights.A).mul_(weights.scale)
            for part in weights.parts:
                columns = y[start:stop, part.out_start : part.out_stop]
                columns.addmm_(h[:, part.rank_start : part.rank_stop], part.Bt)
