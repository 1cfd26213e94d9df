"""Two devices on Triton's kernels, decode as graphs that both replay: the same tokens as one device on torch alone."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from engine import LLM, SamplingParams
from engine.assembly import assembly
from engine.base.backends import Backends
from engine.base.base_model import BaseModel, choose_base
from engine.config.config import EngineConfig
from engine.tensor_parallel.parallel_executor import ParallelExecutor
from lora.target_modules import OUTER_SITES, SITES
from model.sampling.device import Fetched
from tests.kernels.interpreter import INTERPRETED
from tests.oracles import hf
from tests.oracles.peft_model import write_adapter
from tests.oracles.tokenizer import write_tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not INTERPRETED, reason="the interpreter is off: kernels run on a device alone"),
    # Rows that pad a replayed step compute with whatever the memory holds, and nothing of them is read.
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]

ADAPTERS = {
    "r5": peft.LoraConfig(r=5, lora_alpha=10, target_modules=["q_proj", "v_proj", "down_proj"]),
    "r24": peft.LoraConfig(r=24, lora_alpha=24, target_modules=[*SITES, *OUTER_SITES]),
}
WAYS: tuple[dict[str, Any], ...] = ({"temperature": 0.0}, {"temperature": 0.9, "top_p": 0.8, "n": 2})
LENGTHS = (3, 17, 9)
MIXED = (None, "r5", "r24")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("model")
    base = hf.build("llama-3")
    hf.save(base, folder / "base")
    write_tokenizer(folder / "base")
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        write_adapter(base, folder / name, config, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield folder


def generate(folder: Path, size: int, graphs: bool = True) -> tuple[list[list[tuple[int, ...]]], object]:
    """The tokens of the base alone, and of a mix; and what ran the steps."""
    llm = LLM(
        folder / "base", {name: folder / name for name in ADAPTERS}, dtype="float32", tensor_parallel_size=size,
        cuda_graphs=graphs, max_num_batched_tokens=24, max_model_len=48, kv_cache_bytes=1 << 20,
        adapter_bytes=1 << 20,
    )  # fmt: skip
    rng = random.Random(3)
    prompts = [[rng.randrange(4, 300) for _ in range(length)] for length in LENGTHS]
    params = [
        SamplingParams(max_tokens=3, ignore_eos=True, seed=i, **WAYS[i % len(WAYS)])
        for i in range(len(prompts))
    ]
    results = llm.generate(prompts[:1], params[:1]) + llm.generate(prompts, params, MIXED)
    executor = llm.engine.core._executor
    llm.close()
    return [[output.token_ids for output in result.outputs] for result in results], executor


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[tuple[int, ...]]]:
    return generate(folder, size=1)[0]


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "no graphs"])
def test_two_devices_on_kernels_answer_as_one_on_torch(
    folder: Path, expected: list[list[tuple[int, ...]]], graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chosen(config: EngineConfig) -> BaseModel:
        return replace(choose_base(config), backends=Backends("triton", torch.float32, uses_triton=True))

    monkeypatch.setattr(assembly, "choose_base", chosen)
    monkeypatch.setattr(
        Fetched, "done", property(lambda self: False)
    )  # the host goes on before tokens are there
    found, executor = generate(folder, 2, graphs)
    assert found == expected
    assert isinstance(executor, ParallelExecutor)
    graphed: Any = executor._executor
    assert bool(graphed._graphs) == graphs
    if graphs:
        buffers = graphed._graphs._graphs._buffers._by_width.values()
        assert any(len(each._replays) > 1 for each in buffers), "steps with and without adapters"
