"""Which attention backend runs: rules that hold on any machine, asked about devices that are not there."""

import importlib.util
from dataclasses import replace

import pytest
import torch

from model.attention import choice
from model.attention.base import UnsupportedAttention
from model.attention.choice import choose_attention, make_attention
from model.attention.torch_paged import TorchPagedAttention
from model.config import AttentionName
from tests.conformance.test_attention import Geometry

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LLAMA = Geometry(heads=32, kv_heads=8, head_dim=128).config()


@pytest.fixture(params=[True, False], ids=["with flashinfer", "without"])
def flashinfer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the library is installed, as it seems."""
    found = importlib.util.find_spec("torch")
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: found if name != "flashinfer" or request.param else None,
    )
    return request.param


def test_auto_takes_the_best_that_is_there(flashinfer: bool) -> None:
    best = "flashinfer" if flashinfer else "triton"
    assert choose_attention("auto", LLAMA, torch.bfloat16, CUDA) == best
    assert choose_attention("auto", LLAMA, torch.float32, CUDA) == "triton"
    assert choose_attention("auto", replace(LLAMA, head_dim=80), torch.bfloat16, CUDA) == "triton"


@pytest.mark.parametrize("compiled", [True, False])
def test_a_cpu_takes_what_was_compiled(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "load_attend", lambda: _never if compiled else None)
    assert choose_attention("auto", LLAMA, torch.bfloat16, CPU) == ("native" if compiled else "torch")
    assert choose_attention("auto", LLAMA, torch.float16, CPU) == "torch"
    assert choose_attention("auto", replace(LLAMA, head_dim=24), torch.float32, CPU) == "torch"
    remedy = "heads of 24: use torch" if compiled else "without a C\\+\\+ compiler"
    with pytest.raises(UnsupportedAttention, match=remedy):
        choose_attention("native", replace(LLAMA, head_dim=24), torch.float32, CPU)
    with pytest.raises(UnsupportedAttention, match="on a CPU, not on cuda"):
        choose_attention("native", LLAMA, torch.float32, CUDA)


def _never(*numbers: int) -> None:
    raise AssertionError("a choice attends to nothing")


@pytest.mark.parametrize("name", ["torch", "triton", "flashinfer"])
def test_what_is_asked_for_is_taken(name: AttentionName, flashinfer: bool) -> None:
    if name == "flashinfer" and not flashinfer:
        with pytest.raises(UnsupportedAttention, match=r"not installed: scripts/setup cuda"):
            choose_attention(name, LLAMA, torch.bfloat16, CUDA)
    else:
        assert choose_attention(name, LLAMA, torch.bfloat16, CUDA) == name


@pytest.mark.parametrize("name", ["triton", "flashinfer"])
def test_what_needs_a_gpu_is_refused_without_one(name: AttentionName) -> None:
    with pytest.raises(UnsupportedAttention, match="needs a CUDA device, not cpu: use torch or auto"):
        choose_attention(name, LLAMA, torch.bfloat16, CPU)


def test_what_flashinfer_has_no_kernel_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(UnsupportedAttention, match=r"float32: use triton, or --dtype bfloat16"):
        choose_attention("flashinfer", LLAMA, torch.float32, CUDA)
    with pytest.raises(UnsupportedAttention, match="heads of 80: use triton"):
        choose_attention("flashinfer", replace(LLAMA, head_dim=80), torch.bfloat16, CUDA)


def test_the_chosen_one_is_made() -> None:
    assert isinstance(make_attention("torch", LLAMA, CPU), TorchPagedAttention)
