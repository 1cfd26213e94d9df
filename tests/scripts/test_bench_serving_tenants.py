"""Tenants differ in content and rank, and compute what the embedded adapter of their task computes."""

import json
from pathlib import Path
from random import Random

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import Linear
from transformers import AutoModelForCausalLM

from engine.demo.embedded import DEMO_BASE, TASKS, adapter_folders
from scripts.bench.serving.tenants import task_name, write_tenants

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def products(folder: Path) -> dict[str, torch.Tensor]:
    """What the adapter adds to each module's matrix, as PEFT computes it."""
    base = AutoModelForCausalLM.from_pretrained(DEMO_BASE, dtype=torch.float32)
    layers = PeftModel.from_pretrained(base, folder).named_modules()
    return {name: layer.get_delta_weight("default") for name, layer in layers if isinstance(layer, Linear)}


@pytest.mark.slow
def test_a_tenant_adds_what_its_original_adds(tmp_path: Path) -> None:
    names = write_tenants(tmp_path, len(TASKS), Random(0))
    for name in names:
        expected = products(adapter_folders()[task_name(name)])
        for module, found in products(tmp_path / name).items():
            torch.testing.assert_close(found, expected[module])


def test_tenants_of_one_task_differ_in_content_and_in_rank(tmp_path: Path) -> None:
    names = write_tenants(tmp_path, 5 * len(TASKS), Random(1))
    assert {task_name(name) for name in names} == {task.name for task in TASKS}
    assert len({(tmp_path / name / WEIGHTS).read_bytes() for name in names}) == len(names)
    ranks = {json.loads((tmp_path / name / CONFIG).read_text())["r"] for name in names}
    assert min(ranks) == 8
    assert max(ranks) <= 128
