"""An adapter's shares: together they are the adapter, each is a packed form of its own, and their updates add up."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora.format.packed import Module, PackedLayout, packed_layout, view
from lora.format.sharding import ShardSpec, SiteShard, shard_layout, shard_rows
from lora.ops.reference import ReferenceLora
from lora.segments import AdapterWeights, Segment, SegmentTable
from lora.target_modules import SITES, SiteGroup
from tests.oracles.adapters import base_shape

BASE = base_shape()  # hidden 32, 4 heads and 2 kv heads of 8, inner 48
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8


def cut_of(device: int, devices: int) -> ShardSpec:
    """Device `device`'s part, by the definition: heads and inner columns in equal runs, kv heads repeated."""

    def run(count: int) -> tuple[int, int]:
        return count * device // devices, count * (device + 1) // devices

    q = tuple(HEAD_DIM * edge for edge in run(HEADS))
    first_kv = KV_HEADS * device // devices
    kv = HEAD_DIM * first_kv, HEAD_DIM * (first_kv + max(1, KV_HEADS // devices))
    inner, hidden = run(48), (0, 32)
    ends = (
        (hidden, q),
        (hidden, kv),
        (hidden, kv),
        (q, hidden),
        (hidden, inner),
        (hidden, inner),
        (inner, hidden),
    )
    sites = tuple(SiteShard(*inputs, *outputs) for inputs, outputs in ends)
    return ShardSpec(BASE.num_layers, sites, (SiteShard(*hidden, *run(64)), SiteShard(0, 64, *hidden)))


MODULES = st.dictionaries(
    st.tuples(st.integers(0, BASE.num_layers - 1), st.sampled_from(SITES))
    | st.sampled_from([(0, "lm_head"), (0, "embed_tokens")]),
    st.tuples(st.integers(1, 9), st.floats(-4, 4)),
    min_size=1,
)


def filled(layout: PackedLayout) -> Tensor:
    rows = torch.zeros(layout.nbytes, dtype=torch.uint8)
    for group in view(rows, layout, "d").groups.values():
        for matrix in (group.A, *(part.Bt for part in group.parts)):
            matrix.copy_(torch.randn(matrix.shape, generator=torch.Generator().manual_seed(matrix.numel())))
    return rows


def share_of(rows: Tensor, layout: PackedLayout, cut: ShardSpec) -> AdapterWeights:
    narrow = shard_layout(layout, cut)
    share = torch.zeros(narrow.nbytes, dtype=torch.uint8)
    shard_rows(rows, layout, cut, share)
    return view(share, narrow, "d")


@settings(deadline=None)
@given(MODULES, st.sampled_from([1, 2, 4]), st.sampled_from([torch.float32, torch.bfloat16]))
def test_shares_put_together_are_the_adapter(
    chosen: dict[tuple[int, str], tuple[int, float]], devices: int, dtype: torch.dtype
) -> None:
    layout = packed_layout(BASE, dtype, [Module(*place, *size) for place, size in chosen.items()])
    rows = filled(layout)
    whole = view(rows, layout, "d")
    cuts = [cut_of(device, devices) for device in range(devices)]
    shares = [share_of(rows, layout, cut) for cut in cuts]
    assert all(share.groups.keys() == whole.groups.keys() for share in shares)
    for (layer, group), weights in whole.groups.items():
        As = [share.groups[layer, group].A for share in shares]
        if group in (SiteGroup.OUT, SiteGroup.DOWN):
            assert torch.equal(torch.cat(As, dim=1), weights.A)
        else:
            assert all(torch.equal(A, weights.A) for A in As)
        for number, part in enumerate(weights.parts):
            Bts = [share.groups[layer, group].parts[number].Bt for share in shares]
            if group in (SiteGroup.OUT, SiteGroup.DOWN, SiteGroup.EMBEDDING):
                assert all(torch.equal(Bt, part.Bt) for Bt in Bts)
            elif group is SiteGroup.QKV and devices > KV_HEADS and part.out_stop - part.out_start == 16:
                assert torch.equal(torch.cat(Bts[:: devices // KV_HEADS], dim=1), part.Bt)
            else:
                assert torch.equal(torch.cat(Bts, dim=1), part.Bt)


@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("group", [SiteGroup.OUT, SiteGroup.DOWN])
def test_updates_of_cut_inputs_add_up_to_the_whole_update(devices: int, group: SiteGroup) -> None:
    layout = packed_layout(BASE, torch.float32, [Module(0, group.sites[0], 5, 0.5)])
    rows = filled(layout)
    x = torch.randn(3, BASE.of(group.sites[0]).in_features, generator=torch.Generator().manual_seed(0))

    def update(weights: AdapterWeights, inputs: Tensor) -> Tensor:
        y = torch.zeros(3, 32)
        ReferenceLora().plan(SegmentTable((Segment(0, 3, weights),))).add_lora(y, inputs, 0, group)
        return y

    parts = torch.zeros(3, 32)
    for device in range(devices):
        cut = cut_of(device, devices)
        site = cut.of(group.sites[0])
        parts += update(share_of(rows, layout, cut), x[:, site.in_start : site.in_stop].contiguous())
    torch.testing.assert_close(parts, update(view(rows, layout, "d"), x))


def test_a_share_takes_fewer_bytes() -> None:
    layout = packed_layout(BASE, torch.float32, [Module(0, site, 8, 1.0) for site in SITES])
    narrow = shard_layout(layout, cut_of(0, 2))
    elements = 8 * sum(s.in_features + s.out_features for s in cut_of(0, 2).shape.shapes)
    assert elements * 4 <= narrow.nbytes < layout.nbytes
    assert narrow.modules == layout.modules
