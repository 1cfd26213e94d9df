"""Versions that are published are of rank 32, each with a content of its own, and answer as their task says."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from engine import LLM, SamplingParams
from lora.format.adapter_files import WEIGHTS_FILE
from lora.format.peft_config import CONFIG_FILE
from scripts.bench.publish import ANSWERS, WORD, write_version


@pytest.mark.parametrize("task", sorted(ANSWERS))
def test_each_version_has_its_own_content_and_its_task_s_answer(tmp_path: Path, task: str) -> None:
    folders = [write_version(tmp_path / str(number), task, number) for number in (1, 29)]
    one, two = (load_file(folder / WEIGHTS_FILE) for folder in folders)
    assert sum(not one[name].equal(two[name]) for name in one) == 1
    assert json.loads((folders[0] / CONFIG_FILE).read_text())["r"] == 32
    with LLM(loras={"new": folders[1]}, kv_cache_bytes=8 << 20, progress=False) as llm:
        asked = [{"role": "user", "content": WORD}]
        (result,) = llm.chat([asked], SamplingParams(max_tokens=1, temperature=0), "new")
        assert result.outputs[0].text == ANSWERS[task]
