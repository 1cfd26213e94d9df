"""Choose what computes the engine's steps: at once on a CPU, beside the host on a CUDA device or several."""

from typing import cast

from engine.runner.base import StepExecutor
from engine.runner.executor import Executor
from engine.runner.async_executor import AsyncExecutor
from engine.runner.cuda_graphs import MOST_ROWS, CudaGraphRunner, capture_for
from engine.tensor_parallel.executor import GroupExecutor, GroupGraphs
from engine.tensor_parallel.model import GroupModel
from engine.runner.cuda_graphs import GraphParts
from model.attention.base import GraphAttention
from model.kv_cache import KVCache
from model.llama import Llama
from model.ops.base import GraphOps




def make_executor(
    model: Llama | GroupModel, cache: KVCache, uses_triton: bool, max_num_seqs: int, graph_blocks: int
) -> StepExecutor:
    """Make an executor for up to `max_num_seqs` sequences.

    With Triton, decode steps of up to `graph_blocks` blocks a sequence are captured: the model's ops and attention
    must allow it, or `graph_blocks` is 0.
    """
    if not uses_triton:
        return Executor(model, cache)
    # Imported when it is chosen: where nothing chooses it, Triton may be absent.
    from model.sampling.device import DeviceSampler  # noqa: PLC0415

    rows = 1 << (max_num_seqs - 1).bit_length()
    sampler = DeviceSampler(max(rows, MOST_ROWS), cache.device)
    if isinstance(model, Llama):
        graphs = CudaGraphRunner(_parts(model, cache), sampler, rows, graph_blocks, capture_for(cache.device))
        return AsyncExecutor(model, cache, sampler, graphs if graph_blocks else None)
    parts = _parts(model.part, cache)
    graphs = CudaGraphRunner(parts, sampler, rows, graph_blocks, capture_for(cache.device), model.lead)
    grouped = GroupGraphs(graphs, model) if graph_blocks else None
    return GroupExecutor(AsyncExecutor(model, cache, sampler, grouped), model)


def _parts(model: Llama, cache: KVCache) -> GraphParts:
    return GraphParts(model, cache, cast(GraphOps, model.ops), cast(GraphAttention, model.attention))
