"""Make random adapters and batches on a device, as the engine lays them out."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora.format.packed import Module, PackedLayout, packed_layout, view
from lora.segments import AdapterWeights, Segment, SegmentTable
from lora.target_modules import OUTER_SITES, SITES, BaseShape, SiteGroup
from scripts.gpu.context import CheckContext


def flat_layout(base: BaseShape, dtype: torch.dtype, rank: int, sites: Sequence[str] = SITES) -> PackedLayout:
    """Lay out an adapter of one rank on `sites` of every layer, and on those of them that are outside the layers."""
    outer = [Module(0, site, rank, 2.0) for site in sites if site in OUTER_SITES]
    modules = [
        Module(layer, site, rank, 2.0) for layer in range(base.num_layers) for site in sites if site in SITES
    ]
    return packed_layout(base, dtype, modules + outer)


def adapter(
    context: CheckContext,
    base: BaseShape,
    dtype: torch.dtype,
    rank: int,
    sites: Sequence[str] = (*SITES, *OUTER_SITES),
) -> AdapterWeights:
    """Make a random adapter on the device."""
    layout = flat_layout(base, dtype, rank, sites)
    rows = (context.normal(layout.nbytes // dtype.itemsize) * 0.2).to(dtype).view(torch.uint8)
    return view(rows, layout, f"rank-{rank}")


def table_of(spec: Sequence[tuple[int, int | None]], adapters: Sequence[AdapterWeights]) -> SegmentTable:
    """Make the table of `spec`: the rows of each segment and its adapter, None for the base."""
    segments, start = list[Segment](), 0
    for rows, index in spec:
        if index is not None:
            segments.append(Segment(start, start + rows, adapters[index % len(adapters)]))
        start += rows
    return SegmentTable(tuple(segments))


@dataclass(frozen=True, slots=True)
class ProjectionInput:
    """The input of a group's projection, or token ids of the embedding, and what it gives without adapters."""

    x: Tensor
    y: Tensor

    def project(self, x: Tensor) -> Tensor:
        """Project as the base's matrix would."""
        assert x is self.x, "the projection is of the group's input"
        return self.y.clone()


def projection_input(
    context: CheckContext, base: BaseShape, group: SiteGroup, rows: int, dtype: torch.dtype
) -> ProjectionInput:
    """Draw random ones."""
    width = base.of(group.sites[0]).in_features
    x = context.normal(rows, width, dtype=dtype)
    if group is SiteGroup.EMBEDDING:
        x = x.argmax(dim=1)
    return ProjectionInput(x, context.normal(rows, base.group_out(group), dtype=dtype))


def with_adapters(given: ProjectionInput, table: SegmentTable, layer: int, group: SiteGroup) -> Tensor:
    """Compute the equation in float64: y + B (s (A x)), site by site."""
    y, x = given.y.double(), given.x
    for segment in table.segments:
        weights = segment.adapter.groups.get((layer, group))
        for part in weights.parts if weights else ():
            assert weights is not None, "parts are of weights"
            ranks = slice(part.rank_start, part.rank_stop)
            rows, A = x[segment.start : segment.stop], weights.A[ranks].double().t()
            h = (A[rows] if group is SiteGroup.EMBEDDING else rows.double() @ A) * weights.scale[
                ranks
            ].double()
            y[segment.start : segment.stop, part.out_start : part.out_stop] += h @ part.Bt.double()
    return y
