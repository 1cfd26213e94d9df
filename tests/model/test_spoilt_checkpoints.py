"""Spoilt checkpoints: whatever a file says, reading it succeeds or refuses in its own words."""

import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from engine.assembly.tokenizer_loading import load_tokenizer
from engine.errors import InvalidConfig
from model.checkpoint import load_weights
from model.checkpoint_files import CheckpointError, read_config
from model.config import UnsupportedModel
from scripts.fuzz.mutators import spoilt_json, spoilt_safetensors, spoilt_value
from tests.chance import chances
from tests.fakes.tokenizers import byte_tokenizer
from tests.oracles import hf

CPU = torch.device("cpu")
FEW = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FURTHER = ("sliding_window", "eos_token_id", "chat_template", "model_max_length")
ROPES = ("default", "linear", "dynamic", "llama3")
ROPE = {
    "factor": 2.0,
    "rope_theta": 1e4,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = hf.save(hf.build("qwen3"), tmp_path_factory.mktemp("spoilt"))
    byte_tokenizer().save_pretrained(folder)
    return folder


def spoilt(chance: random.Random, path: Path) -> bytes:
    """The file's object, spoilt somewhere, now and then in a scaling of RoPE."""
    content = json.loads(path.read_text())
    if chance.random() < 0.3:
        content["rope_scaling"] = spoilt_value(chance, {"rope_type": chance.choice(ROPES), **ROPE})
    return spoilt_json(chance, content, FURTHER)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_a_spoilt_field_is_taken_or_refused(folder: Path, name: str) -> None:
    path = folder / name
    whole = path.read_bytes()

    @FEW
    @given(chances())
    def read(chance: random.Random) -> None:
        path.write_bytes(spoilt(chance, path))
        try:
            if name == "tokenizer_config.json":
                load_tokenizer(folder)
            else:
                load_weights(folder, read_config(folder), torch.float32, CPU, progress=False)
        except (CheckpointError, UnsupportedModel, InvalidConfig):
            pass
        finally:
            path.write_bytes(whole)

    read()


def test_an_index_that_names_a_file_that_no_system_can_open_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "\ud800"}}))
    with pytest.raises(CheckpointError, match="cannot be read") as refused:
        load_weights(tmp_path, read_config(folder), torch.float32, CPU, progress=False)
    str(refused.value).encode()  # it is sent on


def test_a_spoilt_header_of_weights_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole, config = path.read_bytes(), read_config(folder)

    @FEW
    @given(chances())
    def read(chance: random.Random) -> None:
        path.write_bytes(spoilt_safetensors(chance, whole))
        try:
            load_weights(folder, config, torch.float32, CPU, progress=False)
        except CheckpointError:
            pass
        finally:
            path.write_bytes(whole)

    read()
