"""Steps that the host does not wait for yield what steps that it waits for do, whatever runs together."""

import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import LLM, SamplingParams, StructuredOutputsParams
from engine.offline.result import Result
from lora.adapter import BASE
from model.batch import ForwardBatch
from model.llama import Llama
from scheduler.request import Request
from tests.fakes.host_device import CountedCapture, put_on_device
from tests.oracles.peft_model import write_llama

ADAPTERS = {"r5": 5, "r16": 16, "r64": 64}
ROWS, BLOCKS = 16, 6
BLOCK_BYTES = 16 * 3 * 2 * 2 * 16 * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("device"), ADAPTERS)


def _llm(folder: Path, blocks: int) -> LLM:
    return LLM(
        folder / "base",
        {name: folder / name for name in ADAPTERS},
        dtype="float32",
        max_num_batched_tokens=64,
        kv_cache_bytes=blocks * BLOCK_BYTES,
        adapter_bytes=1 << 24,
    )


@pytest.fixture(params=[200, 24], ids=["roomy", "preempted"])
def pair(request: pytest.FixtureRequest, folder: Path) -> Iterator[tuple[LLM, LLM, CountedCapture]]:
    """The same engine on a CPU and on a device."""
    waits, goes_on = _llm(folder, request.param), _llm(folder, request.param)
    capture = put_on_device(goes_on, ROWS, BLOCKS)
    yield waits, goes_on, capture
    for llm in (waits, goes_on):
        assert llm.engine.core.block_stats().used == 0
        llm.close()


def _compare(
    pair: tuple[LLM, LLM, CountedCapture], params: list[SamplingParams], seed: int = 0
) -> list[Result]:
    rng = random.Random(seed)
    prompts = [tuple(rng.randrange(4, 300) for _ in range(rng.randint(1, 60))) for _ in params]
    names = [rng.choice([None, *ADAPTERS]) for _ in params]
    waits, goes_on, _ = pair
    expected, found = (llm.generate(prompts, params, names) for llm in (waits, goes_on))
    for one, other in zip(found, expected, strict=True):
        for field in ("token_ids", "finish_reason", "text"):
            assert [getattr(each, field) for each in one.outputs] == [
                getattr(each, field) for each in other.outputs
            ]
        logprobs, known = (
            torch.tensor([entry.logprob for each in result.outputs for entry in each.logprobs])
            for result in (one, other)
        )
        torch.testing.assert_close(logprobs, known, rtol=1e-4, atol=1e-5)
        assert len(one.prompt_logprobs) == len(other.prompt_logprobs)
    return found


def test_any_number_of_sequences_of_any_length_and_way_of_drawing(
    pair: tuple[LLM, LLM, CountedCapture],
) -> None:
    rng = random.Random(2)
    params = [
        SamplingParams(
            n=rng.choice((1, 1, 2)),
            max_tokens=rng.randint(1, 30),
            temperature=rng.choice((0.0, 0.7, 1.3)),
            top_k=rng.choice((0, 0, 5)),
            top_p=rng.choice((1.0, 0.8)),
            seed=i,
            ignore_eos=bool(i % 3),
        )
        for i in range(14)
    ]
    _compare(pair, params)
    capture = pair[2]
    assert capture.captures <= 10, "a graph for each width, with and without adapters"
    assert capture.replays > 2 * capture.captures


def test_draws_that_need_the_tokens_before_them(pair: tuple[LLM, LLM, CountedCapture]) -> None:
    plain = SamplingParams(max_tokens=12, temperature=0.8, seed=5)
    ways = (
        {"presence_penalty": 1.5},
        {"repetition_penalty": 1.3},
        {"logit_bias": ((7, 5.0),)},
        {"min_tokens": 6},
        {},
    )
    _compare(pair, [replace(plain, **ways[i % len(ways)]) for i in range(10)], seed=3)


def test_log_probabilities_beside_draws_that_are_not_read_back(pair: tuple[LLM, LLM, CountedCapture]) -> None:
    plain = SamplingParams(max_tokens=10, temperature=0.8, seed=5)
    params = [plain, replace(plain, logprobs=2), plain, replace(plain, prompt_logprobs=0, max_tokens=3)]
    found = _compare(pair, params, seed=4)
    assert len(found[1].outputs[0].logprobs) == len(found[1].outputs[0].token_ids)


def test_texts_of_a_form_beside_others(pair: tuple[LLM, LLM, CountedCapture]) -> None:
    plain = SamplingParams(max_tokens=14, temperature=1.3, seed=5)
    form = replace(plain, structured_outputs=StructuredOutputsParams(regex="(a|bc){3,6}"))
    params = [plain, form, replace(form, presence_penalty=1.5), replace(form, n=2, logprobs=1), plain, form]
    found = _compare(pair, params, seed=5)
    for asked, result in zip(params, found, strict=True):
        if asked.structured_outputs is not None:
            assert all(re.fullmatch("(a|bc){3,6}", output.text) for output in result.outputs)


def test_a_sequence_whose_logits_are_no_numbers_ends_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = _llm(folder, 200)
    put_on_device(llm, ROWS, BLOCKS)
    forward = Llama.forward

    def spoilt(model: Llama, batch: ForwardBatch, *rest: Any) -> Tensor:
        """Adapters' logits are NaN from the third drawn token on."""
        logits = forward(model, batch, *rest)
        rows = batch.logit_rows
        for segment in batch.segments.segments:
            mine = (rows >= segment.start) & (rows < segment.stop) & (batch.positions[rows] >= 4)
            logits[mine] = torch.nan
        return logits

    monkeypatch.setattr(Llama, "forward", spoilt)
    core, params = llm.engine.core, SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, seed=0)
    for name, adapter in (("kept", BASE), ("lost", llm.engine.store.registry.resolve("r16"))):
        core.submit(Request(name, (5, 6, 7), adapter, params, (), 0.0))
    results = [core.step() for _ in range(40)]
    tokens = [event.key.request_id for result in results for event in result.events]
    assert [failure.request_id for result in results for failure in result.failures] == ["lost"]
    assert (tokens.count("lost"), tokens.count("kept")) == (2, 8)
    assert core.block_stats().used == core.num_live_requests == 0
    llm.close()
