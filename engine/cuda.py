"""What an engine on a CUDA device is made of. Imported there alone, since it needs Triton."""

from typing import cast

import torch

from engine.device_executor import DeviceExecutor
from engine.graphs import MOST_ROWS, CudaRecorder, DecodeGraphs, DecodeParts
from lora.ops.triton import TritonLora
from model.attention.base import GraphAttention
from model.config import ModelConfig
from model.kv_cache import KVCache
from model.llama import Llama
from model.ops.base import GraphOps
from model.ops.triton import TritonOps
from model.sampling_device import DeviceSampler


def make_ops(
    config: ModelConfig, dtype: torch.dtype, lora_dtype: torch.dtype, device: torch.device
) -> TritonOps:
    """The layers' arithmetic fused with the adapters' own, for a model of `dtype` and adapters of `lora_dtype`."""
    return TritonOps(config, dtype, TritonLora(config.base_shape(), lora_dtype, device))


def make_executor(
    model: Llama, cache: KVCache, max_num_seqs: int, max_model_len: int, graphs: bool
) -> DeviceExecutor:
    """An executor for up to `max_num_seqs` sequences; with `graphs`, decode steps are recorded: the model's ops and
    attention must be such as can be."""
    rows = 1 << (max_num_seqs - 1).bit_length()
    sampler = DeviceSampler(max(rows, MOST_ROWS), cache.device)
    if not graphs:
        return DeviceExecutor(model, cache, sampler, None)
    attention, ops = cast(GraphAttention, model.attention), cast(GraphOps, model.ops)
    parts = DecodeParts(model, cache, ops, attention, sampler)
    blocks = -(-max_model_len // cache.block_size)
    return DeviceExecutor(model, cache, sampler, DecodeGraphs(parts, rows, blocks, CudaRecorder()))
