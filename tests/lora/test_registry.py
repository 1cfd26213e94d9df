"""Names change at once, contents stay while they are used, and a broken adapter leaves no trace."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import safetensors.torch
import torch

from lora.errors import AdapterRefused, UnknownAdapter
from tests.lora.store_rig import PAGES_OF_RANK_4, StoreRig, first_weight


def test_load_makes_resident_and_names(make_rig: Callable[[int], StoreRig]) -> None:
    s = make_rig(2)
    ref = s.load(1)
    assert s.store.ready() == {ref.digest}
    assert s.store.registry.resolve("a1") == ref
    assert s.store.registry.names() == ("a1",)
    assert (ref.rank, ref.name) == (4, "a1")
    stats = s.store.stats()
    assert (stats.resident, stats.resident_bytes, stats.free_pages) == (1, ref.nbytes, PAGES_OF_RANK_4)


def test_declared_adapters_are_read_on_first_use(make_rig: Callable[[int], StoreRig]) -> None:
    s = make_rig(2)
    folder = s.folder(1)
    s.store.registry.declare("lazy", folder)
    assert [(entry.name, entry.ref) for entry in s.store.registry.entries()] == [("lazy", None)]
    ref = s.store.registry.resolve("lazy")
    assert s.store.registry.entries()[0].ref == ref
    assert ref.digest in s.store.ready()


def test_declare_refuses_a_folder_without_configuration(
    make_rig: Callable[[int], StoreRig], tmp_path: Path
) -> None:
    with pytest.raises(AdapterRefused, match=r"adapter_config\.json"):
        make_rig(1).store.registry.declare("empty", tmp_path)


def test_unknown_names_are_told(make_rig: Callable[[int], StoreRig]) -> None:
    s = make_rig(1)
    with pytest.raises(UnknownAdapter, match="ghost"):
        s.store.registry.resolve("ghost")
    with pytest.raises(UnknownAdapter, match="ghost"):
        s.store.registry.unload("ghost")


def test_loading_the_same_content_again_changes_nothing(make_rig: Callable[[int], StoreRig]) -> None:
    s = make_rig(2)
    first = s.load(1)
    again = s.load(1)
    assert again == first
    stats = s.store.stats()
    assert (stats.resident, stats.loads) == (1, 1)


def test_two_names_share_one_content(make_rig: Callable[[int], StoreRig]) -> None:
    s = make_rig(2)
    first, second = s.load(1, "x"), s.load(1, "y")
    assert first == second
    assert (first.name, second.name) == ("x", "y")
    s.store.registry.unload("x")
    assert s.store.ready() == {second.digest}
    s.store.registry.unload("y")
    s.step()
    assert s.store.stats().free_pages == s.pages.num_pages


def test_a_reload_is_safe_for_requests_on_the_old_content(make_rig: Callable[[int], StoreRig]) -> None:
    s = make_rig(2)
    old = s.load(1, "a")
    s.store.retain(old)
    before = first_weight(s.store, old)
    new = s.load(2, "a")
    assert new != old
    assert s.store.registry.resolve("a") == new
    assert torch.equal(first_weight(s.store, old), before)
    assert not torch.equal(first_weight(s.store, new), before)
    s.store.release(old)
    assert s.store.ready() == {new.digest}
    with pytest.raises(UnknownAdapter):
        s.store.retain(old)


def test_unload_drains_then_frees(make_rig: Callable[[int], StoreRig]) -> None:
    s = make_rig(1)
    ref = s.load(1)
    s.store.retain(ref)
    s.store.ready()
    lease = s.store.acquire((ref,))
    s.store.registry.unload("a1")
    with pytest.raises(UnknownAdapter):
        s.store.registry.resolve("a1")
    s.store.release(ref)
    assert s.store.stats().free_pages == 0, "leased"
    assert lease.weights[ref.digest].groups
    lease.release()
    assert s.store.stats().free_pages == s.pages.num_pages


@pytest.mark.parametrize("resident", [True, False])
def test_a_broken_adapter_leaves_no_trace(make_rig: Callable[[int], StoreRig], resident: bool) -> None:
    s = make_rig(2)
    ref = s.load(1, "a")
    if not resident:
        s.load(2)
        s.load(3)
    before, names = s.store.stats(), s.store.registry.names()
    bad = s.folder(9)
    weights = bad / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(AdapterRefused, match="truncated"):
        s.store.registry.load("a", bad)
    assert s.store.stats() == before
    assert s.store.registry.names() == names
    assert s.store.registry.resolve("a") == ref


def test_an_adapter_larger_than_the_arena_is_refused_with_the_numbers(
    make_rig: Callable[[int], StoreRig],
) -> None:
    s = make_rig(1)
    with pytest.raises(AdapterRefused, match=rf"\d+ bytes.* {s.pages.nbytes} bytes"):
        s.store.registry.load("big", s.folder(1, rank=8))
    assert s.store.registry.names() == ()


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOMEM])
def test_a_fault_that_may_pass_is_not_remembered(
    make_rig: Callable[[int], StoreRig], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fault(*arguments: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    s = make_rig(1)
    s.store.registry.declare("poet", s.folder(1))
    monkeypatch.setattr("lora.format.adapter_files.os.readv", fault)
    for _ in range(2):
        with pytest.raises(AdapterRefused, match=os.strerror(number)) as refusal:
            s.store.registry.resolve("poet")
        assert refusal.value.may_pass
    monkeypatch.undo()
    assert s.store.registry.resolve("poet").rank == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    ("side", "alpha", "cause"),
    [
        ("B", 8, "all lora_B are zero"),
        ("A", 8, "all lora_A are zero"),
        (None, 0, "lora_alpha is 0"),
        (None, 8, ""),
    ],
)
def test_an_adapter_that_changes_nothing_is_said_to(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    dtype: torch.dtype,
    side: str | None,
    alpha: int,
    cause: str,
) -> None:
    s = StoreRig(tmp_path, 4, dtype=dtype)
    folder = s.folder(1)
    weights = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    zeroed = {name: tensor * (0 if f"lora_{side}" in name else -1) for name, tensor in weights.items()}
    safetensors.torch.save_file(zeroed, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text()) | {
        "lora_alpha": alpha,
        "alpha_pattern": {},
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    s.store.registry.load("poet", folder)
    (entry,) = s.store.registry.entries()
    assert (entry.inertia or "").startswith(cause)
    assert bool(entry.inertia) is bool(cause)
    assert ("poet changes nothing" in caplog.text) is bool(cause)
