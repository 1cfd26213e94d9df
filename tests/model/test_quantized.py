"""Quantised base matrices: bounded errors, fewer bytes, and adapters that stay exact above them."""

from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine import LLM, SamplingParams
from engine.errors import InvalidConfig
from lora.target_modules import SITES
from model.checkpoint import load_weights
from model.checkpoint_files import read_config
from model.config import LinearName, Quantization
from model.linear.choice import make_linear
from model.linear.quantized import Fp8Linear, Int8Linear
from model.parallel import Shard
from model.weights import WeightsForm
from tests.model.driver import CPU
from tests.oracles import hf
from tests.oracles.peft_model import PeftOracle, write_adapter
from tests.oracles.tokenizer import write_tokenizer

PROMPTS = [
    torch.randint(4, 300, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (12, 40, 7, 25, 33, 18)
]


def made(rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(96, 64, generator=generator) * torch.rand(96, 1, generator=generator)
    bias = torch.randn(96, generator=generator)
    x = torch.randn(rows, 64, generator=generator) * torch.logspace(-2, 2, max(rows, 1))[:rows, None]
    return weight.to(dtype), bias.to(dtype), x.to(dtype)


@pytest.mark.parametrize("rows", [0, 1, 3, 24, 25, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("form", ["torch", "native"])
def test_int8_is_within_its_rounding(rows: int, dtype: torch.dtype, biased: bool, form: LinearName) -> None:
    """Each weight is off by half a step of its channel at most, so a product by at most |x|₁ times that."""
    weight, bias, x = made(rows, dtype)
    y = make_linear(weight, bias if biased else None, "int8", form)(x)
    exact = F.linear(x.float(), weight.float(), bias.float() if biased else None)
    assert (y.dtype, y.shape, y.is_contiguous()) == (dtype, exact.shape, True)
    step = weight.float().abs().amax(1) / 127
    rounding = 2**-7 * (1 + exact.abs()) * 3 if dtype == torch.bfloat16 else 1e-4 * (1 + exact.abs())
    bound = x.float().abs().sum(1)[:, None] * step / 2 + rounding
    if dtype == torch.bfloat16:  # the channel's scale is rounded to it
        bound = bound + 2**-8 * (x.float().abs() @ weight.float().abs().t())
    assert ((y.float() - exact).abs() <= bound).all()
    assert rows == 0 or (y.float() - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("rows", [0, 1, 3, 16, 130])
@pytest.mark.parametrize("biased", [False, True])
def test_fp8_is_within_its_rounding(rows: int, biased: bool) -> None:
    """Both factors keep 4 significant bits: each product is off by an eighth of itself at most (or by the smallest
    step of its scale), the sum in the mean by far less."""
    weight, bias, x = made(rows, torch.bfloat16)
    y = make_linear(weight, bias if biased else None, "fp8")(x)
    exact = F.linear(x.float(), weight.float(), bias.float() if biased else None)
    assert (y.dtype, y.shape) == (torch.bfloat16, exact.shape)
    products = x.float().abs() @ weight.float().abs().t()
    assert ((y.float() - exact).abs() <= products / 8 + 2**-6 * (1 + exact.abs())).all()
    assert rows == 0 or (y.float() - exact).norm() < 0.06 * exact.norm()


def test_rows_keep_their_own_scales() -> None:
    """A row of large activations does not coarsen the others, nor does a row of zeros spoil anything."""
    weight, _, x = made(8, torch.bfloat16)
    x[3] = 0
    linear = make_linear(weight, None, "fp8")
    together = linear(x)
    assert torch.equal(together[3], torch.zeros_like(together[3]))
    assert torch.equal(linear(x[:1]), together[:1])


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_a_layer_takes_a_byte_an_element(form: Quantization, tmp_path: Path) -> None:
    folder = hf.save(hf.build("llama-3"), tmp_path)
    config = read_config(folder)
    weights = load_weights(folder, config, torch.bfloat16, CPU, False, WeightsForm(Shard(), form))
    for layer in weights.layers:
        for linear in (layer.qkv, layer.out, layer.gate_up, layer.down):
            assert isinstance(linear, Int8Linear | Fp8Linear)
            outputs, inputs = linear.weight.shape
            assert linear.weight.untyped_storage().nbytes() == outputs * inputs
            assert linear.scale.nbytes <= outputs * 4
    assert weights.embedding.dtype == torch.bfloat16


@pytest.mark.parametrize("size", [1, 2])
def test_an_engine_in_int8_says_almost_what_the_exact_one_says(size: int, tmp_path: Path) -> None:
    base = hf.build("llama-3")
    hf.save(base, tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    config = peft.LoraConfig(r=12, lora_alpha=24, target_modules=list(SITES))
    loras = {"a": write_adapter(base, tmp_path / "a", config, seed=5)}
    oracle = PeftOracle(base, loras)
    llm = LLM(
        tmp_path / "base", loras, dtype="float32", quantization="int8", tensor_parallel_size=size,
        kv_cache_bytes=1 << 22, adapter_bytes=1 << 22,
    )  # fmt: skip
    adapters = [None, "a"] * 3
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, prompt_logprobs=0)
    results = llm.generate(PROMPTS, params, adapters)
    llm.close()
    errors, others, same = [], [], 0
    for prompt, adapter, result in zip(PROMPTS, adapters, results, strict=True):
        following = torch.tensor(prompt[1:])[:, None]
        told = torch.tensor([entry.logprob for entry in result.prompt_logprobs])
        errors.append((told - oracle.logprobs(adapter, prompt)[:-1].gather(1, following)[:, 0]).abs())
        wrong = None if adapter else "a"
        others.append((told - oracle.logprobs(wrong, prompt)[:-1].gather(1, following)[:, 0]).abs())
        same += oracle.greedy(adapter, prompt, 5) == list(result.outputs[0].token_ids)
    assert torch.cat(errors).mean() < 0.05  # the logits' standard deviation is 3
    assert torch.cat(errors).mean() < torch.cat(others).mean() / 10
    assert same >= 4


def test_what_the_device_has_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"quantization='fp8' .*a CPU has no fp8 arithmetic: use int8"):
        LLM(hf.save(hf.build("llama-3"), tmp_path), quantization="fp8", device="cpu")
