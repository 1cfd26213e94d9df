"""Whatever an adapter's folder holds, it is served or refused by name; nothing else ever comes of it."""

import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora.errors import AdapterRefused
from lora.format.adapter_files import WEIGHTS_FILE
from lora.format.peft import pack
from lora.format.peft_config import CONFIG_FILE, HONOURED, REFUSED
from scripts.fuzz.mutators import file_spoiler
from tests.chance import chances, examples
from tests.oracles.adapters import base_shape, random_tensors, write_folder

BASE = base_shape()
TENSORS = random_tensors(BASE, 2, seed=1, sites=["q_proj"])
FIELDS = sorted(HONOURED | REFUSED.keys())


def served_or_refused(change: Callable[[Path], object], fields: dict[str, Any] | None = None) -> None:
    with tempfile.TemporaryDirectory() as root:
        folder = write_folder(Path(root) / "adapter", TENSORS, **(fields or {}))
        change(folder)
        try:
            pack("adapter-x", folder, BASE, torch.bfloat16, most_bytes=1 << 20)
        except AdapterRefused as refused:
            str(refused).encode()  # it is sent on


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
@settings(deadline=None, max_examples=examples(200))
@given(chances())
def test_any_file(name: str, chance: random.Random) -> None:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_bytes(file_spoiler(name, path.read_bytes(), FIELDS)(chance))

    served_or_refused(change)


@settings(deadline=None, max_examples=examples(60))
@given(st.floats(width=32), st.floats() | st.integers(-(10**40), 10**40))
def test_any_numbers(number: float, alpha: float) -> None:
    def change(folder: Path) -> None:
        tensors = {name: torch.full_like(tensor, number) for name, tensor in TENSORS.items()}
        safetensors.torch.save_file(tensors, folder / WEIGHTS_FILE)

    served_or_refused(change, {"lora_alpha": alpha})
