"""What an engine on a CUDA device is made of. Imported there alone, since it needs Triton."""

from typing import cast

import torch

from engine.runner.base import StepExecutor
from engine.runner.async_executor import DeviceExecutor
from engine.runner.cuda_graphs import MOST_ROWS, DecodeGraphs, recorder
from engine.tensor_parallel.executor import GroupExecutor, GroupGraphs
from engine.tensor_parallel.model import GroupModel
from engine.runner.cuda_graphs import DecodeParts
from lora.ops.triton.op import TritonLora
from model.attention.base import GraphAttention
from model.config import ModelConfig
from model.kv_cache import KVCache
from model.llama import Llama
from model.ops.base import GraphOps
from model.ops.triton.layer import TritonOps
from model.sampling.device import DeviceSampler




def make_executor(
    model: Llama | GroupModel, cache: KVCache, max_num_seqs: int, graph_blocks: int
) -> StepExecutor:
    """An executor for up to `max_num_seqs` sequences. Decode steps of up to `graph_blocks` blocks a sequence are
    recorded: the model's ops and attention must be such as can be, or it is 0."""
    rows = 1 << (max_num_seqs - 1).bit_length()
    sampler = DeviceSampler(max(rows, MOST_ROWS), cache.device)
    if isinstance(model, Llama):
        graphs = DecodeGraphs(_parts(model, cache), sampler, rows, graph_blocks, recorder(cache.device))
        return DeviceExecutor(model, cache, sampler, graphs if graph_blocks else None)
    parts = _parts(model.part, cache)
    graphs = DecodeGraphs(parts, sampler, rows, graph_blocks, recorder(cache.device), model.lead)
    grouped = GroupGraphs(graphs, model) if graph_blocks else None
    return GroupExecutor(DeviceExecutor(model, cache, sampler, grouped), model)


def _parts(model: Llama, cache: KVCache) -> DecodeParts:
    return DecodeParts(model, cache, cast(GraphOps, model.ops), cast(GraphAttention, model.attention))
