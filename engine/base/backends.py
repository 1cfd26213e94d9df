"""Backends: what a model's steps are computed with on a device, and on every device of a group alike."""

from dataclasses import dataclass

import torch

from engine.config.config import EngineConfig
from engine.errors import InvalidConfig
from model.attention.base import UnsupportedAttention
from model.attention.choice import choose_attention
from model.config import ModelConfig
from model.ops.base import LayerOps
from model.ops.choice import make_ops

_LORA_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True, slots=True)
class Backends:
    """`attention` is a backend's name, never auto; `lora_dtype` is what adapters are kept in; `fused` says whether
    layers, adapters and draws are Triton's kernels, or else plain torch."""

    attention: str
    lora_dtype: torch.dtype
    fused: bool

    def ops(self, part: ModelConfig, dtype: torch.dtype, device: torch.device) -> LayerOps:
        """The layers' arithmetic for a model of `dtype`, or a part of one."""
        return make_ops(part, dtype, self.lora_dtype, device, self.fused)

    def can_capture(self, model: ModelConfig) -> bool:
        """Whether decode steps can be graphs. A dynamic rope reads lengths on the host, and torch's attention plans
        there."""
        return self.fused and self.attention != "torch" and model.rope.kind != "dynamic"


def choose_backends(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device
) -> Backends:
    """What `config` asks for, for a model that computes in `dtype`. Raises InvalidConfig."""
    try:
        attention = choose_attention(config.attention_backend, model, dtype, device)
    except UnsupportedAttention as error:
        raise InvalidConfig("attention_backend", config.attention_backend, error.remedy) from error
    return Backends(attention, _lora_dtype(config.lora_dtype, dtype, device), fused=device.type == "cuda")


def _lora_dtype(name: str, model: torch.dtype, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else model
    if name == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise InvalidConfig("lora_dtype", name, "this GPU has no fp8 numbers (before sm_89): use bfloat16")
    if name not in _LORA_DTYPES:
        raise InvalidConfig("lora_dtype", name, f"use auto, {' or '.join(_LORA_DTYPES)}")
    return _LORA_DTYPES[name]
