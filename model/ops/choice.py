"""Choose the arithmetic between a layer's matrices."""

import torch

from lora.ops.triton.op import TritonLora
from model.config import ModelConfig
from model.ops.triton.layer import TritonOps


def make_ops(
    config: ModelConfig, dtype: torch.dtype, lora_dtype: torch.dtype, device: torch.device
) -> TritonOps:
    """The layers' arithmetic fused with the adapters' own, for a model of `dtype` and adapters of `lora_dtype`."""
    return TritonOps(config, dtype, TritonLora(config.base_shape(), lora_dtype, device))
