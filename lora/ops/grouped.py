"""The LoRA arithmetic segment by segment in plain torch: runs on any device, needs no compiler."""

from torch import Tensor

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
            rows = slice(segment.start, segment.stop)
            h = (x[rows].mm(weights.A.t()) * weights.scale).to(x.dtype)
            for part in weights.parts:
                columns = y[rows, part.out_start : part.out_stop]
                columns.addmm_(h[:, part.rank_start : part.rank_stop], part.Bt)
