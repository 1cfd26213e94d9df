"""Choose what computes the engine's steps: at once on a CPU, beside the host on a CUDA device or several."""

from engine.runner.async_executor import AsyncExecutor
from engine.runner.base import StepExecutor
from engine.runner.cuda_graphs import MOST_ROWS, CudaGraphRunner, GraphParts, capture_for
from engine.runner.executor import Executor
from engine.tensor_parallel.parallel_executor import ParallelExecutor, ParallelGraphs
from engine.tensor_parallel.parallel_model import ParallelModel
from model.kv_cache import KVCache
from model.llama import Llama


def make_executor(
    model: Llama | ParallelModel, cache: KVCache, uses_triton: bool, max_num_seqs: int, graph_blocks: int
) -> StepExecutor:
    """Make an executor for up to `max_num_seqs` sequences.

    With Triton, decode steps of up to `graph_blocks` blocks a sequence are captured. The model's ops and attention
    must allow it, or `graph_blocks` is 0.
    """
    if not uses_triton:
        return Executor(model, cache)
    # Imported when it is chosen: where nothing chooses it, Triton may be absent.
    from model.sampling.device import DeviceSampler  # noqa: PLC0415

    rows = 1 << (max_num_seqs - 1).bit_length()
    sampler = DeviceSampler(max(rows, MOST_ROWS), cache.device)
    if isinstance(model, Llama):
        graphs = CudaGraphRunner(
            GraphParts.of(model, cache), sampler, rows, graph_blocks, capture_for(cache.device)
        )
        return AsyncExecutor(model, cache, sampler, graphs if graph_blocks else None)
    parts = GraphParts.of(model.part, cache)
    graphs = CudaGraphRunner(parts, sampler, rows, graph_blocks, capture_for(cache.device), model.lead)
    parallel = ParallelGraphs(graphs, model) if graph_blocks else None
    return ParallelExecutor(AsyncExecutor(model, cache, sampler, parallel), model)
