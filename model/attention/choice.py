"""Choose the attention backend that a model runs on: the one place that knows them all.

Triton's is imported when it is chosen, since it needs Triton, which a CPU may lack; flashinfer's library likewise.
"""

import importlib.util

import torch

from model.attention.base import AttentionBackend, UnsupportedAttention
from model.attention.flashinfer_paged import DTYPES as FLASHINFER_DTYPES
from model.attention.flashinfer_paged import HEAD_DIMS as FLASHINFER_HEAD_DIMS
from model.attention.flashinfer_paged import FlashInferAttention, load_flashinfer
from model.attention.native.native_paged import DTYPES as NATIVE_DTYPES
from model.attention.native.native_paged import LANES, load_attend, native_paged
from model.attention.torch_paged import TorchPagedAttention
from model.config import AttentionChoice, AttentionName, ModelConfig


def choose_attention(
    name: AttentionChoice, config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> AttentionName:
    """Return the backend that `name` means for a model that computes in `dtype` on `device`, never auto.

    auto is native on a CPU where it was compiled and takes the model's dtype and head size, else torch; on a CUDA
    device likewise flashinfer, else triton. Raises UnsupportedAttention if the one asked for cannot attend here.
    """
    if name == "auto":
        return _best(config, dtype, device)
    if reason := _refused(name, config, dtype, device):
        raise UnsupportedAttention(name, reason)
    return name


def make_attention(chosen: AttentionName, config: ModelConfig, device: torch.device) -> AttentionBackend:
    """Make the backend `chosen` by `choose_attention`, for a model or a part of one."""
    if chosen == "torch":
        return TorchPagedAttention(config)
    if chosen == "triton":
        # Imported when it is chosen: where nothing chooses it, Triton may be absent.
        from model.attention.triton.backend import TritonPagedAttention  # noqa: PLC0415

        return TritonPagedAttention(config)
    if chosen == "native":
        attend = load_attend()
        assert attend is not None, "choose_attention has seen it"
        return native_paged(config, attend)
    return FlashInferAttention(config, device, load_flashinfer())


def _best(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> AttentionName:
    if device.type != "cuda":
        return "torch" if _refused("native", config, dtype, device) else "native"
    return "triton" if _refused("flashinfer", config, dtype, device) else "flashinfer"


def _refused(
    name: AttentionName, config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Return why the backend cannot attend here and what to do, if it cannot."""
    if name == "torch":
        return None
    if name == "native":
        return _refused_by_native(config, dtype, device)
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device.type}: use torch or auto"
    if importlib.util.find_spec(name) is None:
        remedy = "scripts/setup cuda" if name == "flashinfer" else "install torch's CUDA build"
        return f"it is not installed: {remedy}, or use auto"
    return _refused_by_flashinfer(config, dtype) if name == "flashinfer" else None


def _refused_by_native(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"it computes on a CPU, not on {device.type}: use auto"
    if load_attend() is None:
        return "the project was installed without a C++ compiler: install one and the project again, or use torch"
    if dtype not in NATIVE_DTYPES or config.head_dim % LANES:
        return f"it does not take {dtype} and heads of {config.head_dim}: use torch"
    return None


def _refused_by_flashinfer(config: ModelConfig, dtype: torch.dtype) -> str | None:
    if dtype not in FLASHINFER_DTYPES:
        return f"it has no kernel for {dtype}: use triton, or --dtype bfloat16"
    if config.head_dim not in FLASHINFER_HEAD_DIMS:
        return f"it has no kernel for heads of {config.head_dim}: use triton"
    return None
