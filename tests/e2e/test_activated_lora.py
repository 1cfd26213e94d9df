"""Activated LoRAs against PEFT's own: where they begin to act, and what they share with the base and each other."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import peft
import pytest
import torch
from peft.tuners.lora.variants import calculate_alora_offsets
from torch import Tensor

from engine import LLM, SamplingParams
from engine.offline.result import Result
from lora.target_modules import SITES
from tests.e2e.oracle_rig import Job, OracleRig
from tests.oracles import hf
from tests.oracles.peft_model import write_adapter
from tests.oracles.tokenizer import write_tokenizer

OUTPUT_TOKENS = 6
BLOCK = 16
GREEDY = SamplingParams(temperature=0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
SCORED = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, prompt_logprobs=0)
INVOCATIONS = {"one": [7], "three": [8, 9, 8], "other": [7, 7]}


class ActivatedOracle:
    """PEFT's model of several activated LoRAs, without any K/V: each pass computes all tokens anew."""

    def __init__(self, folder: Path, loras: dict[str, Path]) -> None:
        base = hf.build("llama-3").eval()
        first, *others = loras.items()
        self._model = peft.PeftModel.from_pretrained(base, str(first[1]), adapter_name=first[0])
        for name, path in others:
            self._model.load_adapter(str(path), adapter_name=name)
        self._model.eval()

    def logits(self, adapter: str | None, prompt: Sequence[int], drawn: Sequence[int] = ()) -> Tensor:
        """Return [T, vocab] float32; the invocation is looked for in the prompt alone."""
        token_ids = torch.tensor([[*prompt, *drawn]])
        with torch.no_grad():
            if adapter is None:
                with self._model.disable_adapter():
                    return self._model(token_ids).logits[0].float()
            self._model.set_adapter(adapter)
            config = self._model.peft_config
            told = calculate_alora_offsets(config, adapter, torch.tensor([list(prompt)]))
            (offset,) = cast("list[int | None]", told)
            offsets = [None if offset is None else offset + len(drawn)]
            return self._model(token_ids, alora_offsets=offsets).logits[0].float()

    def greedy(self, adapter: str | None, prompt: Sequence[int]) -> tuple[int, ...]:
        """Return what greedy decoding adds."""
        drawn: list[int] = []
        while len(drawn) < OUTPUT_TOKENS:
            drawn.append(int(self.logits(adapter, prompt, drawn)[-1].argmax()))
        return tuple(drawn)


Rig = OracleRig[ActivatedOracle]


def _text(seed: int, length: int) -> tuple[int, ...]:
    """Return tokens of which no invocation has any."""
    rng = random.Random(seed)
    return tuple(rng.randrange(10, 300) for _ in range(length))


def _jobs() -> tuple[Job, ...]:
    """One conversation, with invocations at its start, in it, at its end, twice, overlapping and nowhere."""
    text = _text(3, 75)
    jobs = [Job(None, text), Job(None, (*text, 7, *text[:9]))]
    for name, invocation in INVOCATIONS.items():
        call = tuple(invocation)
        jobs += [
            Job(name, (*call, *text)),
            Job(name, (*text[:31], *call, *text[31:])),
            Job(name, (*text[:32], *call, *text[32:])),
            Job(name, (*text, *call)),
            Job(name, (*text[:20], *call, *text[20:], *call, 11)),
            Job(name, text),
            Job(name, call),
        ]
    overlapping = (*text[:46], 8, 9, 8, 9, 8, *text[46:50])
    # Of the last the third invocation is whole only beyond the block in which it begins.
    return (*jobs, Job("three", overlapping), Job("other", (*text[:60], 7, 7, 7)))


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Rig:
    folder = tmp_path_factory.mktemp("activated")
    base = hf.build("llama-3")
    hf.save(base, folder / "base")
    write_tokenizer(folder / "base")
    loras: dict[str, Path] = {}
    for seed, (name, invocation) in enumerate(INVOCATIONS.items()):
        config = peft.LoraConfig(
            r=8,
            lora_alpha=16,
            target_modules=list(SITES),
            task_type="CAUSAL_LM",
            alora_invocation_tokens=invocation,
        )
        loras[name] = write_adapter(base, folder / name, config, seed)
    oracle = ActivatedOracle(folder / "base", loras)
    jobs = _jobs()
    expected = tuple(oracle.greedy(job.adapter, job.prompt) for job in jobs)
    return Rig(folder / "base", loras, jobs, expected, oracle)


def _open(rig: Rig, rows: int = 512, blocks: int = 400, **options: object) -> LLM:
    return LLM(
        rig.folder,
        rig.loras,
        dtype="float32",
        block_size=BLOCK,
        max_num_batched_tokens=rows,
        kv_cache_bytes=blocks * BLOCK * 3 * 2 * 2 * 16 * 4,
        adapter_bytes=1 << 24,
        **options,
    )


@pytest.fixture(
    params=[("roomy", 512, 400), ("chunked", 48, 400), ("crumbs", 5, 400), ("preempted", 512, 14)]
)
def llm(request: pytest.FixtureRequest, rig: Rig) -> Iterator[LLM]:
    """The engine with room for all, with prompts cut into chunks of two sizes, and with too few blocks for all."""
    _, rows, blocks = request.param
    llm = _open(rig, rows, blocks)
    yield llm
    assert llm.engine.core.block_stats().used == 0
    llm.close()


def _tokens(results: Sequence[Result]) -> list[tuple[int, ...]]:
    return [result.outputs[0].token_ids for result in results]


def test_answers_are_pefts_wherever_the_invocation_stands(
    request: pytest.FixtureRequest, rig: Rig, llm: LLM
) -> None:
    for _ in range(2):  # first with an empty prefix cache, then out of it
        results = llm.generate([job.prompt for job in rig.jobs], GREEDY, [job.adapter for job in rig.jobs])
        assert _tokens(results) == list(rig.expected)
    preempts = request.node.callspec.params["llm"][0] == "preempted"
    assert (llm.engine.core.live().preemptions > 0) == preempts


def test_one_at_a_time_they_are_pefts_too(rig: Rig) -> None:
    llm = _open(rig)
    for job, expected in zip(reversed(rig.jobs), reversed(rig.expected), strict=True):
        assert _tokens(llm.generate([job.prompt], GREEDY, job.adapter)) == [expected], job
    llm.close()


def test_log_probabilities_are_pefts(rig: Rig, llm: LLM) -> None:
    jobs = [job for job in rig.jobs if len(job.prompt) > 1]
    results = llm.generate([job.prompt for job in jobs], SCORED, [job.adapter for job in jobs])
    for job, result in zip(jobs, results, strict=True):
        expected = rig.oracle.logits(job.adapter, job.prompt).log_softmax(-1)[:-1]
        following = torch.tensor(job.prompt[1:])[:, None]
        told = torch.tensor([entry.logprob for entry in result.prompt_logprobs])
        torch.testing.assert_close(told, expected.gather(1, following)[:, 0], rtol=1e-4, atol=1e-4)


def test_the_oracle_tells_the_adapters_and_positions_apart(rig: Rig) -> None:
    text = _text(3, 75)
    prompts = [(*text, 7, 7, 8, 9, 8), (*text[:40], 7, 7, 8, 9, 8, *text[40:])]
    answers = [rig.oracle.logits(name, prompt)[-1] for prompt in prompts for name in (None, *INVOCATIONS)]
    pairs = [(one, other) for at, one in enumerate(answers) for other in answers[:at]]
    assert min(float((one - other).abs().max()) for one, other in pairs) > 1e-3


def test_the_base_and_all_adapters_share_what_stands_before_an_invocation(rig: Rig) -> None:
    llm = _open(rig)
    text = _text(5, 5 * BLOCK + 3)
    prompts: list[tuple[str | None, tuple[int, ...]]] = [
        ("one", (*text, 7, 11)),  # reads all of it
        ("three", (*text, 8, 9, 8, 11)),
        (None, (*text, 12, 13)),
        ("other", (*text, 7, 7)),
        ("one", (*text, 7, 11)),
        ("one", (*text[:40], 7, *text[40:])),
    ]
    before = [0, 80, 80, 80, 80, 32]
    for (adapter, prompt), shared in zip(prompts, before, strict=True):
        steps = llm.engine.core.history.count
        (result,) = llm.generate([prompt], GREEDY, adapter)
        assert result.cached_tokens == shared, (adapter, prompt)
        assert result.outputs[0].token_ids == rig.oracle.greedy(adapter, prompt)
        records = llm.engine.core.history.last()[: llm.engine.core.history.count - steps]
        assert sum(record.tokens for record in records) == len(prompt) - shared + OUTPUT_TOKENS - 1
    llm.close()


def test_an_answers_tokens_are_not_taken_for_the_bases(rig: Rig) -> None:
    """A second turn of the base reads what an adapter wrote; under the adapter it is there already."""
    llm = _open(rig)
    turn = (*_text(6, 3 * BLOCK - 4), 7)
    long = SamplingParams(temperature=0, max_tokens=2 * BLOCK, ignore_eos=True)
    (answer,) = llm.generate([turn], long, "one")
    after = (*turn, *answer.outputs[0].token_ids)
    assert 7 not in answer.outputs[0].token_ids, "the second turn's invocation would be another"
    for adapter, shared in ((None, 2 * BLOCK), ("one", 4 * BLOCK)):
        (result,) = llm.generate([after], GREEDY, adapter)
        assert result.cached_tokens == shared
        assert result.outputs[0].token_ids == rig.oracle.greedy(adapter, after)
    llm.close()
