"""Which attention backend a model runs on: the one place that knows them all. Those whose libraries are optional are
imported when they are chosen."""

import importlib
import importlib.util
from collections.abc import Callable

import torch

from model.attention.base import AttentionBackend, UnsupportedAttention
from model.attention.torch_paged import TorchPagedAttention
from model.config import ModelConfig

BACKENDS = ("auto", "torch", "triton", "flashinfer")


def choose_attention(
    name: str, config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> AttentionBackend:
    """The backend `name` of BACKENDS for a model that computes in `dtype` on `device`.

    auto is torch on a CPU; on a CUDA device flashinfer where it is installed and takes the model's dtype and head
    size, else triton. Raises UnsupportedAttention if the one asked for cannot attend here.
    """
    if name == "auto":
        name = _best(config, dtype, device)
    makers: dict[str, Callable[[], AttentionBackend]] = {
        "torch": lambda: TorchPagedAttention(config),
        "triton": lambda: _triton(config, device),
        "flashinfer": lambda: _flashinfer(config, dtype, device),
    }
    if name not in makers:
        raise UnsupportedAttention(name, f"use {', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}")
    return makers[name]()


def _best(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> str:
    if device.type != "cuda":
        return "torch"
    if importlib.util.find_spec("flashinfer") is None:
        return "triton"
    return "triton" if _refused_by_flashinfer(config, dtype) else "flashinfer"


def _refused_by_flashinfer(config: ModelConfig, dtype: torch.dtype) -> str | None:
    """Why, if it is."""
    door = importlib.import_module("model.attention.flashinfer_paged")
    if dtype not in door.DTYPES:
        return f"it has no kernel for {dtype}: use triton, or --dtype bfloat16"
    if config.head_dim not in door.HEAD_DIMS:
        return f"it has no kernel for heads of {config.head_dim}: use triton"
    return None


def _triton(config: ModelConfig, device: torch.device) -> AttentionBackend:
    try:
        knobs = importlib.import_module("triton").knobs
        backend = importlib.import_module("model.attention.triton_paged")
    except ImportError as error:
        remedy = f"it cannot be imported ({error}): install torch's CUDA build"
        raise UnsupportedAttention("triton", remedy) from error
    if device.type != "cuda" and not knobs.runtime.interpret:
        raise UnsupportedAttention("triton", f"it needs a CUDA device, not {device.type}: use torch or auto")
    return backend.TritonPagedAttention(config)


def _flashinfer(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> AttentionBackend:
    if device.type != "cuda":
        remedy = f"it needs a CUDA device, not {device.type}: use torch or auto"
        raise UnsupportedAttention("flashinfer", remedy)
    if reason := _refused_by_flashinfer(config, dtype):
        raise UnsupportedAttention("flashinfer", reason)
    door = importlib.import_module("model.attention.flashinfer_paged")
    return door.FlashInferAttention(config, device, door.load_flashinfer())
