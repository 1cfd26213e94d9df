"""How flashinfer is used, over a fake of it; that the results are right is tests/conformance/test_attention.py's.
The library itself has not run in these tests."""

import sys

import pytest
import torch

from model.attention.base import UnsupportedAttention
from model.attention.flashinfer_paged import FlashInferAttention, load_flashinfer
from tests.conformance.test_attention import Geometry, World
from tests.fakes.flashinfer import FakeFlashInfer


def make(geometry: Geometry, lengths: tuple[int, ...]) -> tuple[FakeFlashInfer, World]:
    library = FakeFlashInfer()
    backend = FlashInferAttention(geometry.config(), torch.device("cpu"), library)
    return library, World(backend, geometry, lengths)


def test_a_step_is_planned_once_for_each_window_whatever_the_layers() -> None:
    library, world = make(Geometry(windows=(None, 40, None, 40, 40)), (30, 70))
    world.check([(0, 0, 30), (1, 0, 69)])
    world.check([(1, 69, 70)])
    assert [each.plans for each in library.prefills] == [1, 1]
    assert [each.plans for each in library.decodes] == [1, 1]


def test_rows_of_prompts_and_of_decode_run_together() -> None:
    """Where they lie: they are never parted, since they alternate from adapter to adapter."""
    library, world = make(Geometry(), (30, 20, 9))
    world.step([(0, 0, 29), (2, 0, 8)])
    world.check([(0, 29, 30), (1, 0, 20), (2, 8, 9)])
    assert library.prefills[0].plans == 2
    assert library.decodes[0].plans == 0


def test_blocks_before_the_window_are_not_named() -> None:
    library, world = make(Geometry(windows=(20,), block_size=4), (100,))
    world.store([(0, 0, 99)])
    world.check([(0, 99, 100)])
    assert library.decodes[0].pages == 5


@pytest.mark.parametrize(("heads", "cores"), [(2, False), (8, False), (16, True)])
def test_decode_takes_the_tensor_cores_for_many_heads_of_one_kv_head(heads: int, cores: bool) -> None:
    library, _ = make(Geometry(heads=heads, kv_heads=2), (3,))
    assert library.decodes[0].use_tensor_cores == cores


@pytest.mark.parametrize(("heads", "enough"), [(32, 128 << 20), (64, 64 * 383 * 16 * (128 + 1) * 4)])
def test_the_workspace_holds_the_widest_replayed_steps_sums(heads: int, enough: int) -> None:
    """256 rows of 8 kv heads: as flashinfer's planner counts its tiles, 383 where 8 query heads share a kv head."""
    library, _ = make(Geometry(heads=heads, kv_heads=8, head_dim=128), (3,))
    assert library.decodes[0].workspace_bytes >= enough


def test_a_reserved_step_has_a_wrapper_of_its_own() -> None:
    library, world = make(Geometry(), (30, 70))
    backend = world.backend
    assert isinstance(backend, FlashInferAttention)
    reserved = backend.reserve(4, 8, world.cache)
    before = len(library.decodes)
    world.store([(0, 0, 29), (1, 0, 69)])
    reserved.refill(world.batch([(0, 29, 30)]))
    reserved.refill(world.batch([(0, 29, 30), (1, 69, 70)]))
    assert [each.plans for each in library.decodes] == [0, 2]
    assert len(library.decodes) == before
    assert library.decodes[1].pages == 2 + 5 + 2  # and one for each row that no sequence takes


def test_a_missing_library_is_said_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(UnsupportedAttention, match=r"scripts/setup cuda, or choose triton"):
        load_flashinfer()
