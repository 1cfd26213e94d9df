"""Whatever an adapter's folder holds, it is served or refused by name; nothing else ever comes of it."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora.errors import AdapterRefused
from lora.format.peft import WEIGHTS_FILE, pack
from lora.format.peft_config import CONFIG_FILE, HONOURED, REFUSED
from tests.chance import examples
from tests.oracles.adapters import base_shape, random_tensors, write_folder

BASE = base_shape()
TENSORS = random_tensors(BASE, 2, seed=1, sites=["q_proj"])
TEXTS = st.text(st.characters(), max_size=8) | st.sampled_from(
    ["q_proj", ".*", "(a|b)*", "(", "[", "all-linear", "model.layers.1", "\ud800", "a" * 5000, "{9}", "\\"]
)
NUMBERS = (
    st.integers() | st.floats() | st.sampled_from([0, -1, 2, 10**400, 1e308, -1e30, float("nan"), True, None])
)
VALUES = st.recursive(
    NUMBERS | TEXTS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3)
)
FIELDS = st.dictionaries(st.sampled_from(sorted(HONOURED | REFUSED.keys())) | TEXTS, VALUES, max_size=3)


def served_or_refused(change: Callable[[Path], object], fields: dict[str, Any] | None = None) -> None:
    with tempfile.TemporaryDirectory() as root:
        folder = write_folder(Path(root) / "adapter", TENSORS, **(fields or {}))
        change(folder)
        try:
            pack("adapter-x", folder, BASE, torch.bfloat16, most_bytes=1 << 20)
        except AdapterRefused as refused:
            str(refused).encode()  # it is sent on


@settings(deadline=None, max_examples=examples(150))
@given(FIELDS)
def test_any_fields(fields: dict[str, object]) -> None:
    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG_FILE).read_text())
        (folder / CONFIG_FILE).write_text(json.dumps(config | fields))

    served_or_refused(change)


@st.composite
def edits(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Replace a stretch of a file by other bytes, near its start as a rule."""
    at, length = draw(st.integers(0, 400) | st.integers(0, 100_000)), draw(st.integers(0, 12))
    new = draw(
        st.binary(max_size=12) | st.sampled_from([b"9" * 40, b"[" * 200, b"-1", b"null", b'"F4"', b"0"])
    )
    return lambda content: content[:at] + new + content[at + length :]


@settings(deadline=None, max_examples=examples(100))
@given(st.sampled_from([CONFIG_FILE, WEIGHTS_FILE]), st.lists(edits(), min_size=1, max_size=3))
def test_any_bytes(name: str, changes: list[Callable[[bytes], bytes]]) -> None:
    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        for edit in changes:
            content = edit(content)
        (folder / name).write_bytes(content)

    served_or_refused(change)


@settings(deadline=None, max_examples=examples(100))
@given(
    st.sampled_from(["F32", "BF16", "F16", "F64", "I8", "BOOL", "F4", "F8_E4M3", "C64", "X", ""]),
    st.lists(st.integers(-1, 5) | st.sampled_from([0, 32, 2**31, 2**62, 2**64, 10**30]), max_size=4),
    st.lists(st.integers(-8, 300) | st.sampled_from([2**63, 2**64]), max_size=3),
    TEXTS,
)
def test_any_header(dtype: str, shape: list[int], offsets: list[int], name: str) -> None:
    def change(folder: Path) -> None:
        entry = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        path = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
        header = json.dumps({path: entry, name: entry}).encode()
        (folder / WEIGHTS_FILE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(256))

    served_or_refused(change)


@settings(deadline=None, max_examples=examples(60))
@given(st.floats(width=32), st.floats() | st.integers(-(10**40), 10**40))
def test_any_numbers(number: float, alpha: float) -> None:
    def change(folder: Path) -> None:
        tensors = {name: torch.full_like(tensor, number) for name, tensor in TENSORS.items()}
        safetensors.torch.save_file(tensors, folder / WEIGHTS_FILE)

    served_or_refused(change, {"lora_alpha": alpha})
