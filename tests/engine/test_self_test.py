"""Before they serve, the base and each adapter compute a prompt: what gives no numbers, or changes none, is told."""

import shutil
from pathlib import Path

import pytest
import safetensors.torch

from engine import LLM, SamplingParams
from engine.demo.embedded import DEMO_BASE, adapter_folders
from engine.serve import USAGE_ERROR, main
from lora.errors import AdapterRefused
from model.checkpoint_files import CheckpointError

SIZES = {"max_model_len": 64, "kv_cache_bytes": 1 << 20}


def scaled(source: Path, to: Path, marks: tuple[str, ...], factor: float) -> Path:
    """Copy a folder, and multiply the tensors whose names have one of the marks."""
    shutil.copytree(source, to)
    (file,) = to.glob("*.safetensors")
    tensors = safetensors.torch.load_file(file)
    found = {
        name: tensor * factor if any(mark in name for mark in marks) else tensor
        for name, tensor in tensors.items()
    }
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in found.items()}, file)
    return to


@pytest.fixture
def overflowing(tmp_path: Path) -> Path:
    """Make a base whose weights are finite and whose logits are not."""
    return scaled(DEMO_BASE, tmp_path / "overflowing", ("model.norm.weight",), 1e38)


def test_a_base_without_finite_logits_does_not_start(
    overflowing: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(overflowing), "--port", "0", "--no-progress"]
    assert main(arguments) == USAGE_ERROR
    assert "the base model fails on a prompt" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        LLM(overflowing, **SIZES)


def test_the_test_may_be_left_out(overflowing: Path) -> None:
    llm = LLM(overflowing, self_test=False, **SIZES)
    assert llm.engine.core.steps == 0
    llm.close()


def test_a_named_adapter_without_finite_logits_does_not_start(tmp_path: Path) -> None:
    poet = scaled(adapter_folders()["reverse"], tmp_path / "poet", ("q_proj", "k_proj"), 2.5e9)
    with pytest.raises(AdapterRefused, match=r"'poet'.*NaN or infinite"):
        LLM(loras={"poet": poet}, **SIZES)


def test_a_named_adapter_that_changes_nothing_is_said_to_and_served(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    idle = scaled(adapter_folders()["reverse"], tmp_path / "idle", ("lora_B",), 0.0)
    faint = scaled(adapter_folders()["reverse"], tmp_path / "faint", ("lora_B",), 1e-30)
    llm = LLM(loras={"idle": idle, "faint": faint, "reverse": adapter_folders()["reverse"]}, **SIZES)
    told = [record.getMessage() for record in caplog.records if "changes nothing" in record.getMessage()]
    assert told == [
        "adapter idle changes nothing: all lora_B are zero, as before any training",
        "adapter faint changes nothing: a short prompt gets the base's very logits",
    ]
    effects = {entry.name: entry.effect for entry in llm.engine.store.registry.entries()}
    assert [effects[name] for name in ("idle", "faint", "reverse", "swap")] == ["none", "none", "some", None]
    ask = [[{"role": "user", "content": "garden"}]] * 2
    results = llm.chat(ask, SamplingParams(temperature=0), adapters=["idle", "reverse"])
    assert [result.outputs[0].text for result in results] == ["garden", "nedrag"]
    assert llm.engine.core.num_live_requests == 0
    llm.close()


def test_adapters_that_do_not_run_at_once_are_all_tested() -> None:
    names = ("reverse", "rot13", "swap")
    loras = {name: adapter_folders()[name] for name in names}
    llm = LLM(loras=loras, max_num_seqs=1, **SIZES)
    assert llm.engine.core.steps == 1 + len(names)
    llm.close()
