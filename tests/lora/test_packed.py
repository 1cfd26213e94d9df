"""The packed form: true ranks, no padding to a maximum, aligned matrices, and a header that says it all."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora.format.packed import (
    ALIGNMENT,
    InvalidHeader,
    Module,
    PackedLayout,
    digest_of,
    packed_layout,
    read_header,
    view,
    write_header,
)
from lora.target_modules import SITES, SiteGroup, SiteShape
from tests.oracles.adapters import base_shape

BASE = base_shape()

MODULES = st.dictionaries(
    st.tuples(st.integers(0, BASE.num_layers - 1), st.sampled_from(SITES))
    | st.sampled_from([(0, "lm_head"), (0, "embed_tokens")]),
    st.tuples(st.integers(1, 40), st.floats(-4, 4)),
    min_size=1,
)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
Chosen = dict[tuple[int, str], tuple[int, float]]


def layout_of(chosen: Chosen, dtype: torch.dtype) -> PackedLayout:
    return packed_layout(BASE, dtype, [Module(*place, *size) for place, size in chosen.items()])


@settings(deadline=None)
@given(MODULES, DTYPES)
def test_matrices_tile_the_buffer_and_views_name_them(chosen: Chosen, dtype: torch.dtype) -> None:
    layout = layout_of(chosen, dtype)
    rows = torch.zeros(layout.nbytes, dtype=torch.uint8)
    weights = view(rows, layout, "d")
    matrices = [group.A for group in weights.groups.values()]
    matrices += [part.Bt for group in weights.groups.values() for part in group.parts]
    for matrix in matrices:
        assert matrix.is_contiguous()
        assert (matrix.data_ptr() - rows.data_ptr()) % ALIGNMENT == 0
        matrix += 1  # each element belongs to one matrix only
    assert rows.view(dtype).max() == 1
    exact = sum(
        rank * (BASE.of(s).in_features + BASE.of(s).out_features) for (_, s), (rank, _) in chosen.items()
    )
    assert int(rows.view(dtype).sum(dtype=torch.float64)) == exact
    assert exact * dtype.itemsize <= layout.nbytes < exact * dtype.itemsize + ALIGNMENT * len(matrices)


@settings(deadline=None)
@given(MODULES, DTYPES)
def test_views_follow_the_fused_projections(chosen: Chosen, dtype: torch.dtype) -> None:
    layout = layout_of(chosen, dtype)
    weights = view(torch.zeros(layout.nbytes, dtype=torch.uint8), layout, "d")
    found: Chosen = {}
    for (layer, group), stacked in weights.groups.items():
        ends, end = {}, 0
        for site in group.sites:
            ends[end] = site
            end += BASE.of(site).out_features
        for part in stacked.parts:
            rank_rows = stacked.scale[part.rank_start : part.rank_stop]
            assert part.Bt.shape == (len(rank_rows), part.out_stop - part.out_start)
            found[layer, ends[part.out_start]] = len(rank_rows), float(rank_rows[0])
        assert stacked.A.shape == (len(stacked.scale), BASE.of(group.sites[0]).in_features)
    rounded = {place: (rank, float(torch.tensor(scale))) for place, (rank, scale) in chosen.items()}
    assert found == rounded


@settings(deadline=None)
@given(MODULES, DTYPES)
def test_the_header_brings_the_layout_back(chosen: Chosen, dtype: torch.dtype) -> None:
    layout = layout_of(chosen, dtype)
    assert read_header(write_header(layout)) == layout


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format":"other"}', '{"format":"loraserve-flat-1"}', "nonsense"]
)
def test_other_headers_are_refused(text: str) -> None:
    with pytest.raises(InvalidHeader, match="pack"):
        read_header(text)


def test_the_digest_tells_contents_apart() -> None:
    one = packed_layout(BASE, torch.float32, [Module(0, "q_proj", 4, 2.0)])
    scaled = packed_layout(BASE, torch.float32, [Module(0, "q_proj", 4, 1.0)])
    moved = packed_layout(BASE, torch.float32, [Module(1, "q_proj", 4, 2.0)])
    rows = torch.zeros(one.nbytes, dtype=torch.uint8)
    other = rows.clone()
    other[7] = 1
    digests = {digest_of(one, rows), digest_of(scaled, rows), digest_of(moved, rows), digest_of(one, other)}
    assert len(digests) == 4
    assert digest_of(one, rows.clone()) in digests


def test_an_adapter_of_one_group_has_no_other() -> None:
    layout = packed_layout(BASE, torch.float32, [Module(2, "k_proj", 3, 1.0)])
    weights = view(torch.zeros(layout.nbytes, dtype=torch.uint8), layout, "d")
    assert set(weights.groups) == {(2, SiteGroup.QKV)}
    assert (layout.rank, layout.sites) == (3, ("k_proj",))


def test_only_adapters_of_the_ends_know_their_shape() -> None:
    """So the others' digests are those that a base without a head or an embedding gives, and they fit one with them."""
    plain, head, embedding = (
        layout_of({(0, site): (4, 1.0)}, torch.float32) for site in ("q_proj", "lm_head", "embed_tokens")
    )
    assert head == packed_layout(replace(BASE, outer=BASE.outer[:1]), torch.float32, head.modules)
    assert '"outer":[[32,64]]' in write_header(head)
    assert '"outer":[[32,64],[64,32]]' in write_header(embedding)
    assert plain == packed_layout(replace(BASE, outer=()), torch.float32, plain.modules)
    assert "outer" not in write_header(plain)
    assert plain.fits(BASE)
    assert head.fits(BASE)
    wider = replace(BASE, outer=(SiteShape(32, 65),))
    assert plain.fits(wider)
    assert not head.fits(wider)
    assert not embedding.fits(wider)
    assert embedding.fits(BASE)
    assert head.nbytes == embedding.nbytes == 4 * (32 + 64) * 4
