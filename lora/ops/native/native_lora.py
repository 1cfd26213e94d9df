"""Add all segments' updates in one call of compiled code, each at its own rank, on every core.

Sums are in float32 and in an order of their own for each row, so that an answer does not depend on its company.
"""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora.ops.base import LoraStep
from lora.ops.grouped import GroupedLora, GroupedStep
from lora.ops.native.library import SEGMENT, SITE, AddLora
from lora.segments import AdapterWeights, GroupWeights, Segment, SegmentTable
from lora.target_modules import SiteGroup

_READS = (torch.float32, torch.bfloat16)
MANY_ROWS = (
    64  # of one segment: so many torch multiplies faster, where its bfloat16 product is the faster one
)
_GROUPS = {group: number for number, group in enumerate(SiteGroup)}
Laid = NDArray[np.void]


class NativeLora:
    """LoraOp over compiled code; what that does not read is left to GroupedLora."""

    def __init__(self, add: AddLora, lora_dtype: torch.dtype, torch_rows: int | None = None) -> None:
        """Call `add`, as lora.ops.native.library loads it, with adapters of `lora_dtype`.

        With `torch_rows` bfloat16 segments of so many rows are left to torch. Then a row's sums depend on its segment.
        """
        self._add, self._lora_dtype, self._torch_rows = add, lora_dtype, torch_rows
        self._sites: WeakKeyDictionary[AdapterWeights, Laid] = WeakKeyDictionary()

    def plan(self, table: SegmentTable) -> LoraStep:
        """See LoraOp."""
        if self._lora_dtype not in _READS:
            return GroupedLora().plan(table)
        ordered = sorted(table.segments, key=self._is_torchs)
        few = sum(not self._is_torchs(segment) for segment in ordered)
        sites = tuple(self._sites_of(segment.adapter) for segment in ordered)
        laid = [(of.start, of.stop, at.ctypes.data, len(at)) for of, at in zip(ordered, sites, strict=True)]
        many = SegmentTable(tuple(ordered[few:]))
        return NativeStep(self._add, table, np.array(laid, SEGMENT), sites, self._lora_dtype, few, many)

    def _is_torchs(self, segment: Segment) -> bool:
        return self._torch_rows is not None and segment.stop - segment.start >= self._torch_rows

    def _sites_of(self, adapter: AdapterWeights) -> Laid:
        """Lay out where an adapter's weights are, once for as long as it is resident."""
        sites = self._sites.get(adapter)
        if sites is None:
            layers = 1 + max((layer for layer, _ in adapter.groups), default=-1)
            sites = np.zeros(layers * len(_GROUPS), SITE)
            for (layer, group), weights in adapter.groups.items():
                sites[_number(layer, group)] = _laid_out(weights)
            self._sites[adapter] = sites
        return sites


@dataclass(frozen=True, slots=True)
class NativeStep:
    """LoraStep over one step's segments, laid out as SEGMENT, the `few` first ones of few rows, and then `many`.

    `sites` keeps alive what these point at.
    """

    add: AddLora
    table: SegmentTable
    segments: Laid
    sites: tuple[Laid, ...]
    lora_dtype: torch.dtype
    few: int
    many: SegmentTable

    def add_lora(self, y: Tensor, x: Tensor, layer: int, group: SiteGroup) -> None:
        """See LoraStep; the products are in float32, and their sum is rounded once, to y's dtype."""
        if y.dtype not in _READS:
            GroupedStep(self.table).add_lora(y, x, layer, group)
            return
        tokens = group is SiteGroup.EMBEDDING
        narrow = y.dtype == torch.bfloat16, self.lora_dtype == torch.bfloat16
        count = self.few if all(narrow) and not tokens else len(self.segments)
        if count:
            self.add(
                *(y.data_ptr(), y.shape[1], x.data_ptr(), 1 if tokens else x.shape[1]),
                self.segments.ctypes.data,
                *(count, _number(layer, group), tokens, *narrow, torch.get_num_threads()),
            )
        if count < len(self.segments):
            GroupedStep(self.many).add_lora(y, x, layer, group)


def _number(layer: int, group: SiteGroup) -> int:
    return layer * len(_GROUPS) + _GROUPS[group]


def _laid_out(weights: GroupWeights) -> tuple[object, ...]:
    """Lay out one (layer, group) of an adapter as a SITE."""
    parts = [
        (part.Bt.data_ptr(), part.rank_start, part.rank_stop, part.out_start, part.out_stop)
        for part in weights.parts
    ]
    unused = [(0, 0, 0, 0, 0)] * (SITE["parts"].shape[0] - len(parts))
    A, scale = weights.A.data_ptr(), weights.scale.data_ptr()
    return (A, scale, weights.A.shape[1], len(weights.A), len(parts), parts + unused)
