"""Tiers give back the bytes that were put, or say that they have not got them; never other bytes."""

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from lora.daemon_threads import CallHangs, DeadlineCalls
from lora.errors import AdapterLost
from lora.format.allowed_roots import AdapterFolder
from lora.format.peft import PackedAdapter, pack
from lora.store.tier_chain import TierChain
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


def test_a_file_that_changes_after_a_read_is_not_served(tmp_path: Path) -> None:
    """Whatever hides the change: the same size, the same time, the same file."""
    one = packed(tmp_path, 1)
    tier = DiskTier(tmp_path / "cache")
    tier.put(one)
    assert_gives(tier, one)
    path = tmp_path / "cache" / f"{one.ref.digest}.safetensors"
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"\x3f")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert fetched(tier, one) is None
    tier.put(one)
    assert_gives(tier, one)


def test_a_file_is_one_of_safetensors(tmp_path: Path) -> None:
    one = packed(tmp_path, 1)
    DiskTier(tmp_path / "cache").put(one)
    path = tmp_path / "cache" / f"{one.ref.digest}.safetensors"
    assert torch.equal(safetensors.torch.load_file(path)["rows"], one.rows)


def test_a_folder_that_nothing_can_be_written_to_gives_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = packed(tmp_path, 1), packed(tmp_path, 2)
    tier = DiskTier(tmp_path / "cache", capacity_bytes=0)
    tier.put(one)
    for name in ("utime", "unlink", "replace"):
        monkeypatch.setattr(os, name, full)
    assert_gives(tier, one)
    tier.put(one)
    tier.trim(set())
    assert_gives(tier, one)
    with pytest.raises(OSError, match="No space left"):
        tier.put(two)


def test_an_adapter_is_served_though_its_packed_form_cannot_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = packed(tmp_path, 1)
    chain = TierChain(BASE, torch.float32, DiskTier(tmp_path / "cache"), None)
    monkeypatch.setattr(os, "replace", full)
    assert chain.pack("a1", AdapterFolder(tmp_path / "1"), 1 << 30).ref == one.ref
    chain.remember(one.ref.digest, one.layout, "a1", AdapterFolder(tmp_path / "1"))
    destination = torch.zeros(one.ref.nbytes, dtype=torch.uint8)
    assert not chain.fetch(one.ref.digest, "a1", destination), "not from a peer"
    assert torch.equal(destination, one.rows)


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


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
    tier.remember(one.ref.digest, "a1", AdapterFolder(tmp_path / "1"))
    assert_gives(tier, one)
    write_adapter(tmp_path / "1", BASE, 2, seed=9)
    with pytest.raises(AdapterLost, match=r"'a1' .* was changed after it was loaded"):
        fetched(tier, one)
    (tmp_path / "1" / "adapter_config.json").unlink()
    with pytest.raises(AdapterLost, match=r"has no adapter_config\.json"):
        fetched(tier, one)
    tier.forget(one.ref.digest)
    assert fetched(tier, one) is None


def test_a_cache_that_hangs_gives_nothing_and_keeps_nothing_and_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, mended = packed(tmp_path, 1), threading.Event()
    tier = DiskTier(tmp_path / "cache", files=DeadlineCalls(timeout_s=0.05))
    tier.put(content)
    monkeypatch.setattr("lora.store.tiers.read_rows", lambda *arguments: mended.wait(30))
    destination = torch.zeros(content.rows.numel(), dtype=torch.uint8)
    assert not tier.fetch(content.ref.digest, destination)
    with pytest.raises(CallHangs, match="still does not answer an earlier call"):
        tier.put(content)
    mended.set()
    assert destination.sum() == 0, "what comes too late lands nowhere"
