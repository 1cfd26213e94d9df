"""Adapters in float8_e4m3fn: a byte an element, each matrix by its own step, close to what they were."""

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine import LLM, SamplingParams
from lora.errors import AdapterRefused
from lora.format.packed import digest_of, read_header, view, write_header
from lora.format.peft import PackedAdapter, pack
from lora.ops.base import LoraOp
from lora.ops.grouped import GroupedLora
from lora.ops.reference import ReferenceLora
from lora.segments import Segment, SegmentTable
from lora.target_modules import LAYER_GROUPS, SITES, SiteGroup
from tests.oracles import hf
from tests.oracles.adapters import base_shape, write_adapter
from tests.oracles.peft_model import PeftOracle
from tests.oracles.peft_model import write_adapter as write_over
from tests.oracles.tokenizer import write_tokenizer

BASE = base_shape()
FP8 = torch.float8_e4m3fn
ELEMENT = 2**-4  # relative rounding of a number with 4 significant bits


def both(folder: Path, rank: int) -> tuple[PackedAdapter, PackedAdapter]:
    """The adapter exactly, and in bytes."""
    write_adapter(folder, BASE, rank, seed=rank)
    return pack("a", folder, BASE, torch.float32), pack("a", folder, BASE, FP8)


def updates(packed: PackedAdapter, op: LoraOp, group: SiteGroup, dtype: torch.dtype) -> Tensor:
    weights = view(packed.rows, packed.layout, packed.ref.digest)
    x = torch.randn(6, BASE.of(group.sites[0]).in_features, generator=torch.Generator().manual_seed(3)).to(
        dtype
    )
    y = torch.zeros(6, BASE.group_out(group), dtype=dtype)
    op.plan(SegmentTable((Segment(0, 4, weights),))).add_lora(y, x, 1, group)
    assert not y[4:].any()
    return y.float()


@pytest.mark.parametrize("group", LAYER_GROUPS)
@pytest.mark.parametrize("rank", [5, 64])
def test_updates_are_within_the_rounding_of_their_elements(
    rank: int, group: SiteGroup, tmp_path: Path
) -> None:
    """Each element is off by 1/16 at most and by a third of that in the mean, in both matrices, independently."""
    exact, narrow = both(tmp_path, rank)
    wide = updates(exact, ReferenceLora(), group, torch.float32)
    for op in (ReferenceLora(), GroupedLora()):
        found = updates(narrow, op, group, torch.float32)
        assert (found - wide).norm() < ELEMENT * wide.norm()
        assert (found - wide).norm() > 1e-4 * wide.norm()
    grouped = updates(narrow, GroupedLora(), group, torch.float32)
    torch.testing.assert_close(
        grouped, updates(narrow, ReferenceLora(), group, torch.float32), rtol=1e-5, atol=1e-5
    )
    found = updates(narrow, GroupedLora(), group, torch.bfloat16)
    assert (found - wide).norm() < 1.2 * ELEMENT * wide.norm()


def test_it_takes_a_quarter_of_float32(tmp_path: Path) -> None:
    exact, narrow = both(tmp_path, 16)
    assert narrow.ref.nbytes < exact.ref.nbytes / 4 + 64 * 2 * len(narrow.layout.modules)
    assert narrow.ref.digest != exact.ref.digest
    assert read_header(write_header(narrow.layout)) == narrow.layout
    assert digest_of(narrow.layout, narrow.rows) == narrow.ref.digest


def test_every_matrix_uses_the_whole_range(tmp_path: Path) -> None:
    """However small a matrix's elements are beside another's."""
    write_adapter(tmp_path, BASE, 4, seed=1)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    for number, name in enumerate(sorted(tensors)):
        tensors[name] *= 10.0 ** -(number % 7)
    save_file(tensors, path)
    packed = pack("a", tmp_path, BASE, FP8)
    for group in view(packed.rows, packed.layout, "d").groups.values():
        for part in group.parts:
            assert part.Bt.float().abs().max() == 448
            assert group.A[part.rank_start : part.rank_stop].float().abs().max() == 448


def test_a_matrix_of_zeros_stays_one(tmp_path: Path) -> None:
    write_adapter(tmp_path, BASE, 4, seed=1)
    path = tmp_path / "adapter_model.safetensors"
    save_file({name: tensor * ("lora_A" in name) for name, tensor in load_file(path).items()}, path)
    packed = pack("a", tmp_path, BASE, FP8)
    assert not updates(packed, GroupedLora(), SiteGroup.QKV, torch.float32).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused(value: float, tmp_path: Path) -> None:
    write_adapter(tmp_path, BASE, 4, seed=1)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = value
    save_file(tensors, path)
    with pytest.raises(AdapterRefused, match="NaN or Inf"):
        pack("a", tmp_path, BASE, FP8)


def test_an_engine_serves_them_close_to_the_oracle(tmp_path: Path) -> None:
    base = hf.build("llama-3")
    hf.save(base, tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    config = peft.LoraConfig(r=12, lora_alpha=24, target_modules=list(SITES))
    loras = {"a": write_over(base, tmp_path / "a", config, seed=5)}
    oracle = PeftOracle(base, loras)
    llm = LLM(
        tmp_path / "base",
        loras,
        dtype="float32",
        lora_dtype="fp8",
        kv_cache_bytes=1 << 22,
        adapter_bytes=1 << 22,
    )
    prompt = torch.randint(4, 300, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, prompt_logprobs=0)
    (result,) = llm.generate([prompt], params, "a")
    llm.close()
    told = torch.tensor([entry.logprob for entry in result.prompt_logprobs])
    following = torch.tensor(prompt[1:])[:, None]
    with_a, without = (oracle.logprobs(name, prompt)[:-1].gather(1, following)[:, 0] for name in ("a", None))
    assert (told - with_a).abs().mean() < 0.1 * (with_a - without).abs().mean()
