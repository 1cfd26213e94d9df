"""Choose what a model's steps are computed with: attention's backend, the adapters' dtype, Triton's kernels or torch.

The choice is made once and holds on every device that computes along. It may not know which model file it is for.
"""

from dataclasses import dataclass

import torch

from engine.config.config import EngineConfig, LoraDtype
from engine.errors import InvalidConfig
from lora.ops.native.library import load_add_lora
from model.attention.base import UnsupportedAttention
from model.attention.choice import choose_attention
from model.config import AttentionName, ModelConfig

_LORA_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True, slots=True)
class Backends:
    """`attention` is a backend's name, never auto; `lora_dtype` is what adapters are kept in.

    With `uses_triton` layers, adapters and sampling are Triton's kernels, else plain torch.
    """

    attention: AttentionName
    lora_dtype: torch.dtype
    uses_triton: bool

    def can_capture(self, model: ModelConfig) -> bool:
        """Tell whether decode steps can be CUDA graphs.

        A dynamic rope reads lengths on the host, and torch's attention plans there.
        """
        return self.uses_triton and self.attention != "torch" and model.rope.kind != "dynamic"


def choose_backends(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device
) -> Backends:
    """Choose what `config` asks for, for a model that computes in `dtype`. Raises InvalidConfig."""
    try:
        attention = choose_attention(config.attention_backend, model, dtype, device)
    except UnsupportedAttention as error:
        raise InvalidConfig("attention_backend", config.attention_backend, error.remedy) from error
    lora_dtype = _lora_dtype(config.lora_dtype, dtype, device)
    return Backends(attention, lora_dtype, uses_triton=device.type == "cuda")


def _lora_dtype(choice: LoraDtype, model: torch.dtype, device: torch.device) -> torch.dtype:
    if choice == "auto":  # plain torch multiplies few rows in bfloat16 slower than in float32
        return torch.float32 if device.type == "cpu" and load_add_lora() is None else model
    if choice == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise InvalidConfig("lora_dtype", choice, "this GPU has no fp8 numbers (before sm_89): use bfloat16")
    return _LORA_DTYPES[choice]
