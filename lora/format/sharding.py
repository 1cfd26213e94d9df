"""Cut an adapter's shard for one of several devices, which computes a part of each projection.

The base model's matrices and the adapters' are cut alike. Where a site's outputs are cut, its A is whole and its B
is cut; where its inputs are cut, its A is cut and its B is whole. Then the devices' outputs are partial sums, and so
are the adapters' updates. One sum over the devices completes both (Megatron-LM, arXiv 1909.08053, with S-LoRA's
remark, arXiv 2311.03285, that the adapters' sums can ride on the base's). A shard has the same bytes' order as a
whole packed form; it is the packed form of a model with narrower projections.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from lora.format.packed import PackedLayout, matrix, packed_layout
from lora.target_modules import OUTER_SITES, SITES, BaseShape, SiteShape


@dataclass(frozen=True, slots=True)
class SiteShard:
    """Inputs `in_start:in_stop` and outputs `out_start:out_stop` of one projection."""

    in_start: int
    in_stop: int
    out_start: int
    out_stop: int

    @property
    def inputs(self) -> range:
        """The columns of the projection's matrix."""
        return range(self.in_start, self.in_stop)

    @property
    def outputs(self) -> range:
        """The rows of the projection's matrix."""
        return range(self.out_start, self.out_stop)


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """One device's part of each site: `sites` is aligned with SITES, `outer` with OUTER_SITES.

    The sites of one group have the same inputs. Outputs may go beyond the last one, such that parts are equal.
    """

    num_layers: int
    sites: tuple[SiteShard, ...]
    outer: tuple[SiteShard, ...] = ()

    def of(self, site: str) -> SiteShard:
        """The part of `site`."""
        if site in OUTER_SITES:
            return self.outer[OUTER_SITES.index(site)]
        return self.sites[SITES.index(site)]

    @property
    def shape(self) -> BaseShape:
        """What an adapter's share must fit."""
        return BaseShape(self.num_layers, _shapes(self.sites), _shapes(self.outer))


def _shapes(cuts: tuple[SiteShard, ...]) -> tuple[SiteShape, ...]:
    return tuple(SiteShape(len(cut.inputs), len(cut.outputs)) for cut in cuts)


def shard_layout(layout: PackedLayout, cut: ShardSpec) -> PackedLayout:
    """The layout of the adapter's share: the same modules, ranks and scales over the narrower projections."""
    return packed_layout(cut.shape, layout.dtype, layout.modules)


def shard_rows(rows: Tensor, layout: PackedLayout, cut: ShardSpec, share: Tensor) -> None:
    """Copy a share's bytes.

    rows: [at least layout.nbytes] uint8, whole. share: [at least shard_layout(layout, cut).nbytes] uint8, aligned,
    on any device, filled with zeros; its gaps between matrices, and outputs beyond the last one, are left so.
    """
    narrow = shard_layout(layout, cut)
    whole, part = rows[: layout.nbytes].view(layout.dtype), share[: narrow.nbytes].view(layout.dtype)
    for source, destination in _matrices(whole, layout, part, narrow, cut):
        destination.copy_(source)


def _matrices(
    whole: Tensor, layout: PackedLayout, part: Tensor, narrow: PackedLayout, cut: ShardSpec
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each matrix of the share: where its numbers are in the whole packed form, and where they go."""
    for wide, slim in zip(layout.places, narrow.places, strict=True):
        first = wide.modules[0].site
        inputs = cut.of(first)
        source = matrix(whole, wide.a_start, (wide.rank, layout.base.of(first).in_features))
        columns = narrow.base.of(first).in_features
        yield (
            source[:, inputs.in_start : inputs.in_stop],
            matrix(part, slim.a_start, (slim.rank, columns)),
        )
        for module, start, goal in zip(wide.modules, wide.bt_starts, slim.bt_starts, strict=True):
            outputs = cut.of(module.site)
            source = matrix(whole, start, (module.rank, layout.base.of(module.site).out_features))
            columns = narrow.base.of(module.site).out_features
            source = source[:, outputs.out_start : outputs.out_stop]
            yield source, matrix(part, goal, (module.rank, columns))[:, : source.shape[1]]
