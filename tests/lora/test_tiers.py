"""Tiers give back the bytes that were put, or say that they have not got them; never other bytes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lora.errors import AdapterLost
from lora.format.peft import PackedAdapter, pack
from lora.store.tiers import DiskTier, HostTier, PackedTier, SourceTier
from tests.oracles.adapters import base_shape, write_adapter

BASE = base_shape()


def packed(root: Path, seed: int, rank: int = 2) -> PackedAdapter:
    return pack(f"a{seed}", write_adapter(root / f"{seed}", BASE, rank, seed), BASE, torch.float32)


def fetched(tier: PackedTier | SourceTier, wanted: PackedAdapter) -> Tensor | None:
    """What the tier copies; the destination is a page too long, as in the arena."""
    destination = torch.full((wanted.rows.numel() + 64,), 7, dtype=torch.uint8)
    if not tier.fetch(wanted.ref.digest, destination):
        return None
    assert (destination[-64:] == 7).all(), "beyond the content nothing is written"
    return destination[:-64]


def assert_gives(tier: PackedTier | SourceTier, wanted: PackedAdapter) -> None:
    found = fetched(tier, wanted)
    assert found is not None
    assert torch.equal(found, wanted.rows)


@pytest.fixture(params=["host", "disk"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[int], PackedTier]:
    if request.param == "host":
        return HostTier
    return lambda capacity_bytes: DiskTier(tmp_path / "cache", capacity_bytes)


def test_what_was_put_comes_back(make: Callable[[int], PackedTier], tmp_path: Path) -> None:
    tier, one, two = make(1 << 30), packed(tmp_path, 1), packed(tmp_path, 2)
    assert fetched(tier, one) is None
    for content in (one, two, one):
        tier.put(content)
    for content in (one, two):
        assert_gives(tier, content)


def test_the_longest_unused_goes_first_and_the_kept_never(
    make: Callable[[int], PackedTier], tmp_path: Path
) -> None:
    contents = [packed(tmp_path, seed) for seed in range(4)]
    tier = make(int(2.6 * contents[0].ref.nbytes))
    for content in contents:
        tier.put(content)
    assert fetched(tier, contents[0]) is not None, "used last of all"
    tier.trim(keep={contents[1].ref.digest})
    here = [fetched(tier, content) is not None for content in contents]
    assert here == [True, True, False, False]


def test_files_outlive_the_process(tmp_path: Path) -> None:
    content = packed(tmp_path, 1)
    DiskTier(tmp_path / "cache").put(content)
    assert_gives(DiskTier(tmp_path / "cache"), content)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [f"{content.ref.digest}.safetensors"]


def test_a_file_with_other_bytes_is_not_served(tmp_path: Path) -> None:
    one, two = packed(tmp_path, 1), packed(tmp_path, 2)
    tier = DiskTier(tmp_path / "cache")
    tier.put(one)
    (tmp_path / "cache" / f"{one.ref.digest}.safetensors").rename(
        tmp_path / "cache" / f"{two.ref.digest}.safetensors"
    )
    assert fetched(tier, two) is None
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"x" * 500])
def test_a_file_that_is_no_safetensors_is_not_served(content: bytes, tmp_path: Path) -> None:
    one = packed(tmp_path, 1)
    tier = DiskTier(tmp_path / "cache")
    (tmp_path / "cache" / f"{one.ref.digest}.safetensors").write_bytes(content)
    assert fetched(tier, one) is None
    tier.put(one)
    assert_gives(tier, one)


def test_a_folder_gives_its_content_until_it_changes(tmp_path: Path) -> None:
    one = packed(tmp_path, 1)
    tier = SourceTier(BASE, torch.float32)
    assert fetched(tier, one) is None
    tier.remember(one.ref.digest, "a1", tmp_path / "1")
    assert_gives(tier, one)
    write_adapter(tmp_path / "1", BASE, 2, seed=9)
    with pytest.raises(AdapterLost, match=r"'a1' .* was changed after it was loaded"):
        fetched(tier, one)
    (tmp_path / "1" / "adapter_config.json").unlink()
    with pytest.raises(AdapterLost, match=r"has no adapter_config\.json"):
        fetched(tier, one)
    tier.forget(one.ref.digest)
    assert fetched(tier, one) is None
