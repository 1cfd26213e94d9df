"""The whole engine against transformers + PEFT: many adapters in one batch, each as if it were alone."""

import random
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
from transformers import LlamaForCausalLM

from engine import LLM, SamplingParams
from lora.target_modules import OUTER_SITES, SITES
from model.config import DtypeChoice
from tests.e2e.oracle_rig import Job, OracleRig
from tests.oracles import hf
from tests.oracles.peft_model import PeftOracle, write_adapter
from tests.oracles.tokenizer import write_tokenizer

OUTPUT_TOKENS = 10
GREEDY = SamplingParams(temperature=0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)

ADAPTERS = {
    "r5": peft.LoraConfig(r=5, lora_alpha=10, target_modules=["q_proj", "v_proj", "embed_tokens"]),
    "r8": peft.LoraConfig(r=8, lora_alpha=16, target_modules=list(SITES)),
    "r8-rs": peft.LoraConfig(r=8, lora_alpha=4, use_rslora=True, target_modules=[*SITES, *OUTER_SITES]),
    "r16": peft.LoraConfig(r=16, lora_alpha=32, target_modules=r".*self_attn\.(q|k|v|o)_proj|lm_head"),
    "r24": peft.LoraConfig(r=24, lora_alpha=24, target_modules=["gate_proj", "up_proj", "down_proj"]),
    "r32": peft.LoraConfig(
        r=32,
        lora_alpha=64,
        target_modules=[*SITES, "lm_head"],
        rank_pattern={"o_proj": 6, "lm_head": 4},
        alpha_pattern={"down_proj": 96},
    ),
    "r64": peft.LoraConfig(r=64, lora_alpha=128, target_modules=list(SITES), layers_to_transform=[0, 2]),
    "r128": peft.LoraConfig(r=128, lora_alpha=256, target_modules="all-linear"),
}


Rig = OracleRig[PeftOracle]


def _jobs() -> tuple[Job, ...]:
    rng = random.Random(11)
    names = [None, *ADAPTERS]
    lengths = [1, 2, 15, 16, 17, 31, 64, 700, *(rng.randint(1, 700) for _ in range(24))]
    return tuple(
        Job(names[i % len(names)], tuple(rng.randrange(4, 300) for _ in range(length)))
        for i, length in enumerate(lengths)
    )


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Rig:
    folder = tmp_path_factory.mktemp("oracle")
    base = hf.build("llama-3")
    base.config.max_position_embeddings = 1024
    hf.save(base, folder / "base")
    write_tokenizer(folder / "base")
    loras = {
        name: write_adapter(base, folder / name, config, seed)
        for seed, (name, config) in enumerate(ADAPTERS.items())
    }
    oracle = PeftOracle(base, loras)
    jobs = _jobs()
    expected = tuple(tuple(oracle.greedy(job.adapter, job.prompt, OUTPUT_TOKENS)) for job in jobs)
    return Rig(folder / "base", loras, jobs, expected, oracle)


@pytest.fixture(params=["roomy", "chunked", "preempted"])
def llm(request: pytest.FixtureRequest, rig: Rig) -> Iterator[LLM]:
    """The engine with room for all, with prompts cut into chunks, and with too few blocks for all."""
    llm = LLM(
        rig.folder,
        rig.loras,
        dtype="float32",
        max_num_batched_tokens=48 if request.param == "chunked" else 4096,
        kv_cache_bytes=48 * 16 * 3 * 2 * 2 * 16 * 4 if request.param == "preempted" else 1 << 26,
        adapter_bytes=1 << 24,
    )
    yield llm
    assert llm.engine.core.block_stats().used == 0
    llm.close()


def test_a_mix_of_adapters_and_the_base_answers_as_the_oracle_does_for_each_alone(
    request: pytest.FixtureRequest, rig: Rig, llm: LLM
) -> None:
    results = llm.generate([job.prompt for job in rig.jobs], GREEDY, [job.adapter for job in rig.jobs])
    assert [result.outputs[0].token_ids for result in results] == list(rig.expected)
    preempts = request.node.callspec.params["llm"] == "preempted"
    assert (llm.engine.core.live().preemptions > 0) == preempts


def test_the_oracle_tells_the_adapters_apart(rig: Rig) -> None:
    prompt = rig.jobs[7].prompt
    answers = {tuple(rig.oracle.greedy(name, prompt, OUTPUT_TOKENS)) for name in [None, *ADAPTERS]}
    assert len(answers) == len(ADAPTERS) + 1


def test_log_probabilities_are_the_oracles(rig: Rig, llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, logprobs=3, prompt_logprobs=2)
    jobs = [job for job in rig.jobs if 1 < len(job.prompt) < 200]
    results = llm.generate([job.prompt for job in jobs], params, [job.adapter for job in jobs])
    for job, result in zip(jobs, results, strict=True):
        oracle = rig.oracle.logprobs(job.adapter, job.prompt)
        logprobs = torch.tensor([entry.logprob for entry in result.prompt_logprobs])
        following = torch.tensor(job.prompt[1:])
        torch.testing.assert_close(
            logprobs, oracle[:-1].gather(1, following[:, None])[:, 0], rtol=1e-4, atol=1e-4
        )
        top = torch.tensor([logprob for _, logprob in result.outputs[0].logprobs[0].top])
        torch.testing.assert_close(top, oracle[-1].topk(3).values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_every_family_serves_adapters_beside_its_base(family: str, tmp_path: Path) -> None:
    base = hf.build(family)
    hf.save(base, tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    config = peft.LoraConfig(r=12, lora_alpha=24, target_modules=[*SITES, *OUTER_SITES])
    oracle = PeftOracle(base, {"a": write_adapter(base, tmp_path / "a", config, seed=5)})
    rng = random.Random(3)
    prompts = [tuple(rng.randrange(4, 300) for _ in range(length)) for length in (3, 14, 20)]
    llm = LLM(tmp_path / "base", {"a": tmp_path / "a"}, dtype="float32", max_num_batched_tokens=64)
    for adapters in ([None, "a", None], ["a", None, "a"]):
        results = llm.generate(
            prompts, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True), adapters
        )
        expected = [tuple(oracle.greedy(a, p, 4)) for a, p in zip(adapters, prompts, strict=True)]
        assert [result.outputs[0].token_ids for result in results] == expected
    llm.close()


@pytest.mark.parametrize("way", ["roomy", "chunked", "preempted"])
def test_a_dynamic_rope_knows_no_history(way: str, tmp_path: Path) -> None:
    """Prompts with one beginning, the longest first, beyond the trained length of 24."""
    base = hf.build("llama-dynamic")
    base.config.rope_parameters["factor"] = 8.0
    hf.save(base, tmp_path)
    write_tokenizer(tmp_path)
    common = tuple(random.Random(3).randrange(4, 300) for _ in range(150))
    prompts = [common, *(common[:length] for length in (120, 90, 60, 40, 20))]
    llm = LLM(
        tmp_path,
        dtype="float32",
        max_model_len=180,
        block_size=4,
        max_num_batched_tokens=30 if way == "chunked" else 512,
        kv_cache_bytes=(60 if way == "preempted" else 300) * 4 * 3 * 2 * 2 * 16 * 4,
        adapter_bytes=1 << 20,
    )
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    results = [*llm.generate(prompts[:1], params), *llm.generate(prompts[1:], params)]
    # Each by a model of its own, since transformers' rope remembers the longest sequence that it has met.
    expected = [
        tuple(hf.greedy(LlamaForCausalLM.from_pretrained(tmp_path).eval(), prompt, 24)) for prompt in prompts
    ]
    assert [result.outputs[0].token_ids for result in results] == expected
    llm.close()


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 8), ("float16", 11)])
def test_half_precision_stays_within_its_rounding_of_the_float32_oracle(
    rig: Rig, dtype: DtypeChoice, bits: int
) -> None:
    llm = LLM(rig.folder, rig.loras, dtype=dtype, adapter_bytes=1 << 24, kv_cache_bytes=1 << 24)
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, prompt_logprobs=0)
    jobs = [job for job in rig.jobs if 1 < len(job.prompt) < 100]
    results = llm.generate([job.prompt for job in jobs], params, [job.adapter for job in jobs])
    errors = []
    for job, result in zip(jobs, results, strict=True):
        oracle = rig.oracle.logprobs(job.adapter, job.prompt)[:-1]
        exact = oracle.gather(1, torch.tensor(job.prompt[1:])[:, None])[:, 0]
        errors.append((torch.tensor([entry.logprob for entry in result.prompt_logprobs]) - exact).abs())
    error = torch.cat(errors)
    # Each logit (standard deviation 3) carries a rounding error of about 3 / 2 ** bits per layer.
    assert error.mean() < 20 / 2**bits
    assert error.quantile(0.99) < 100 / 2**bits
    llm.close()
