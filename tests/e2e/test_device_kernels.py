"""The engine on Triton's attention and sampling, decode as graphs that are replayed: the same tokens as on torch
alone."""

import random
from pathlib import Path
from typing import Any

import pytest

from engine import LLM, SamplingParams
from engine.runner.async_executor import AsyncExecutor
from engine.runner.cuda_graphs import CudaGraphRunner, GraphParts
from engine.runner.executor import Executor
from model.attention.triton.backend import TritonPagedAttention
from model.llama import Llama
from model.sampling.device import DeviceSampler
from tests.fakes.host_device import CountedCapture, LoadedOps
from tests.kernels.interpreter import INTERPRETED
from tests.oracles import hf
from tests.oracles.tokenizer import write_tokenizer

pytestmark = pytest.mark.skipif(
    not INTERPRETED, reason="the interpreter is off: kernels run on a device alone"
)

WAYS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.9, "top_p": 0.8},
    {"temperature": 1.2, "top_k": 9},
    {"temperature": 0.7, "min_p": 0.05},
)
PENALISED = {"temperature": 0.7, "presence_penalty": 1.1}  # its steps are not graphs'


def make(folder: Path) -> LLM:
    return LLM(
        folder, dtype="float32", max_num_batched_tokens=48, kv_cache_bytes=1 << 21, adapter_bytes=1 << 20
    )


def put_on_kernels(llm: LLM) -> CountedCapture:
    """As an accelerator is used, with a capture for the graphs."""
    executor = llm.engine.core._executor
    assert isinstance(executor, Executor)
    model, cache = executor._model, executor._cache
    assert isinstance(model, Llama)
    attention, sampler, capture = (
        TritonPagedAttention(model.config),
        DeviceSampler(8, cache.device),
        CountedCapture(),
    )
    ops = LoadedOps(model.ops)
    model.ops, model.attention = ops, attention
    parts = GraphParts(model, cache, ops, attention)
    llm.engine.core._executor = AsyncExecutor(
        model, cache, sampler, CudaGraphRunner(parts, sampler, 8, 8, capture)
    )
    return capture


@pytest.mark.parametrize("ways", [WAYS, (*WAYS[:2], PENALISED)], ids=["graphs", "no graphs"])
def test_same_tokens_on_triton(tmp_path: Path, ways: tuple[dict[str, Any], ...]) -> None:
    hf.save(hf.build("llama-3"), tmp_path)
    write_tokenizer(tmp_path)
    rng = random.Random(0)
    prompts = [tuple(rng.randrange(4, 300) for _ in range(rng.randint(1, 60))) for _ in ways]
    params = [SamplingParams(max_tokens=6, ignore_eos=True, seed=i, **way) for i, way in enumerate(ways)]
    torch_alone, kernels = make(tmp_path), make(tmp_path)
    capture = put_on_kernels(kernels)
    expected, found = (
        [[each.token_ids for each in result.outputs] for result in llm.generate(prompts, params)]
        for llm in (torch_alone, kernels)
    )
    assert found == expected
    assert (capture.replays > 0) == (ways is WAYS)
    for llm in (torch_alone, kernels):
        llm.close()
