"""An assembled engine has what its device needs, and no more."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from engine import LLM
from engine.errors import InvalidConfig
from tests.fakes.tokenizers import EOS, byte_tokenizer
from tests.oracles import hf

STEPS = """
import sys
from engine import LLM, SamplingParams
llm = LLM(device="cpu", max_model_len=64, kv_cache_bytes=1 << 20)
(result,) = llm.generate(["garden"], SamplingParams(temperature=0, max_tokens=2), "reverse")
llm.close()
slow = ("triton", "sympy", "torch.distributed.tensor", "transformers.models.llama")  # each takes seconds
print(len(result.outputs[0].token_ids), *(name for name in slow if name in sys.modules))
"""


@pytest.mark.slow
def test_an_engine_on_a_cpu_steps_without_what_is_slow_to_import() -> None:
    done = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2"]


@pytest.mark.parametrize("generation", [None, [2, 9]])
def test_sequences_end_with_the_tokenizers_end_and_those_that_the_files_name(
    tmp_path: Path, generation: list[int] | None
) -> None:
    hf.save(hf.build("llama-3"), tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    llm = LLM(tmp_path, device="cpu", max_model_len=64, kv_cache_bytes=1 << 20, adapter_bytes=1 << 20)
    (end,) = llm.tokenizer.encode(EOS, add_special=False)
    assert set(llm.engine.card.eos_token_ids) == {end, *(generation or [2])}
    llm.close()


def test_packed_adapters_on_disk_are_bounded(tmp_path: Path) -> None:
    bounded = LLM(
        adapter_cache_dir=tmp_path,
        adapter_cache_bytes=1,
        max_model_len=64,
        kv_cache_bytes=1 << 20,
        self_test=False,
    )
    for name in ("reverse", "upper"):
        bounded.engine.store.registry.resolve(name)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    bounded.close()
    with pytest.raises(InvalidConfig, match="--adapter-cache-dir"):
        LLM(adapter_cache_bytes=1)
