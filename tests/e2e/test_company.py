"""In bfloat16, with compiled code throughout, an answer is the same to the bit alone and in company."""

from pathlib import Path

import peft
import pytest
import torch

from engine import LLM, SamplingParams
from lora.ops.native.library import load_add_lora
from lora.target_modules import SITES
from model.attention.native.native_paged import load_attend
from model.linear.native.native_linear import load_multiply
from tests.oracles import hf
from tests.oracles.peft_model import write_adapter
from tests.oracles.tokenizer import write_tokenizer

LENGTHS = (5, 90, 33, 130, 1, 70, 12, 90)


def told(llm: LLM, prompts: list[list[int]], adapters: list[str | None]) -> list[tuple[object, ...]]:
    """Return each answer's tokens and their log-probabilities, and those of its prompt."""
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=1, prompt_logprobs=0)
    results = llm.generate(prompts, params, adapters)
    return [(each.outputs[0].token_ids, each.outputs[0].logprobs, each.prompt_logprobs) for each in results]


@pytest.mark.skipif(
    None in (load_add_lora(), load_attend(), load_multiply()), reason="installed without a C++ compiler"
)
@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_bfloat16_answer_is_the_same_alone_and_in_company(quantization: str, tmp_path: Path) -> None:
    base = hf.build("llama-head-dim")
    hf.save(base, tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    config = peft.LoraConfig(r=12, lora_alpha=24, target_modules=list(SITES))
    loras = {name: write_adapter(base, tmp_path / name, config, seed=5 + at) for at, name in enumerate("ab")}
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(4, 300, (length,), generator=generator).tolist() for length in LENGTHS]
    adapters = [None, "a", "b", "a", "b", None, "a", "b"]
    llm = LLM(
        tmp_path / "base", loras, dtype="bfloat16", quantization=quantization, linear_backend="native",
        kv_cache_bytes=1 << 22, adapter_bytes=1 << 22, max_num_batched_tokens=2048, self_test=False,
    )  # fmt: skip
    try:
        together = told(llm, prompts, adapters)
        for prompt, adapter, answer in zip(prompts, adapters, together, strict=True):
            assert told(llm, [prompt], [adapter]) == [answer]
    finally:
        llm.close()
