"""Where an activated LoRA begins to act: as PEFT finds it, and part of the content that travels and is kept."""

from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.lora.variants import calculate_alora_offsets

from lora.activation import MOST_INVOCATION_TOKENS, NEVER, activation
from lora.errors import AdapterRefused
from lora.format.companions import read_vocabulary
from lora.format.packed import InvalidHeader, read_header, write_header
from lora.format.peft import PackedAdapter, pack
from lora.peers.manifest import Manifest, read_manifest, write_manifest
from tests.oracles.adapters import base_shape, random_tensors, write_folder

BASE = base_shape()
few_tokens = st.integers(0, 2)


def packed(folder: Path, invocation: object) -> PackedAdapter:
    tensors = random_tensors(BASE, 4, seed=1, sites=["q_proj"])
    return pack("a", write_folder(folder, tensors, alora_invocation_tokens=invocation), BASE, torch.float32)


@given(st.lists(few_tokens, min_size=1, max_size=4), st.lists(few_tokens, min_size=1, max_size=14))
def test_it_begins_where_peft_says(invocation: list[int], prompt: list[int]) -> None:
    configs = {"a": peft.LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=invocation)}
    (offset,) = calculate_alora_offsets(configs, "a", torch.tensor([prompt]))  # pyright: ignore[reportArgumentType]
    assert activation(invocation, prompt) == (NEVER if offset is None else len(prompt) - offset)


def test_an_adapter_without_an_invocation_acts_from_the_first_token() -> None:
    assert activation((), (1, 2)) == 0
    assert activation((1,), ()) == NEVER


def test_the_invocation_is_a_part_of_the_content(tmp_path: Path) -> None:
    plain, one, other = (packed(tmp_path / f"{at}", each) for at, each in enumerate((None, [5, 6], [5])))
    assert (plain.ref.invocation, one.ref.invocation, other.ref.invocation) == ((), (5, 6), (5,))
    assert len({plain.ref.digest, one.ref.digest, other.ref.digest}) == 3
    assert "invocation" not in write_header(plain.layout)
    assert torch.equal(plain.rows, one.rows)
    told = read_manifest("b", write_manifest(Manifest(one.ref, one.layout)))
    assert (told.ref.invocation, told.layout) == ((5, 6), one.layout)
    assert read_vocabulary(tmp_path / "1").invocation == (5, 6)


@pytest.mark.parametrize(
    ("invocation", "shown"),
    [
        ([], r"\[\]"),
        ("<|x|>", r"'<\|x\|>'"),
        (5, "5"),
        (False, "False"),
        ({"5": 5}, r"\{'5': 5\}"),
        ([5.0], r"\[5\.0\]"),
        ([True], r"\[True\]"),
        ([-1], r"\[-1\]"),
        ([1 << 31], r"\[2147483648\]"),
        ([5] * (MOST_INVOCATION_TOKENS + 1), r"\[5, 5, "),
    ],
)
def test_what_is_no_list_of_token_ids_is_refused_by_name(
    tmp_path: Path, invocation: object, shown: str
) -> None:
    with pytest.raises(AdapterRefused, match=rf"alora_invocation_tokens={shown}.*: give a list of 1 to 256"):
        packed(tmp_path, invocation)


@pytest.mark.parametrize("written", ["[]", '"ab"', "[1.5]", "[-1]", "7", "[true]"])
def test_a_manifest_with_another_invocation_is_refused(tmp_path: Path, written: str) -> None:
    one = packed(tmp_path, [5, 6])
    content = write_manifest(Manifest(one.ref, one.layout)).decode().replace("[5,6]", written)
    with pytest.raises(InvalidHeader):
        read_manifest("b", content.encode())


def test_a_packed_form_of_an_earlier_version_has_no_invocation(tmp_path: Path) -> None:
    header = write_header(packed(tmp_path, None).layout)
    assert read_header(header).invocation == ()
