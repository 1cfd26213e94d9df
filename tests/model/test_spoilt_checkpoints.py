"""Spoilt checkpoints: whatever a file says, reading it succeeds or refuses in its own words."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import InvalidConfig
from engine.tokenizer import Tokenizer
from model.checkpoint import CheckpointError, load_weights, read_config
from model.config import UnsupportedModel
from tests.fakes.tokenizers import byte_tokenizer
from tests.oracles import hf

CPU = torch.device("cpu")
FEW = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
ROPES: st.SearchStrategy[Any] = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["default", "linear", "dynamic", "llama3"])},
    optional=dict.fromkeys(
        ("factor", "rope_theta", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        VALUES,
    ),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = hf.save(hf.build("qwen3"), tmp_path_factory.mktemp("spoilt"))
    byte_tokenizer().save_pretrained(folder)
    return folder


def spoilt(data: st.DataObject, path: Path) -> str:
    """The file's object with one field of it, or a further one, of another value."""
    content = json.loads(path.read_text())
    further = ("sliding_window", "rope_scaling", "eos_token_id", "chat_template", "model_max_length")
    field = data.draw(st.sampled_from(sorted({*content, *further})))
    content[field] = data.draw(VALUES | ROPES)
    return json.dumps(content)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_a_spoilt_field_is_taken_or_refused(folder: Path, name: str) -> None:
    path = folder / name
    whole = path.read_text()

    @FEW
    @given(st.data())
    def read(data: st.DataObject) -> None:
        path.write_text(spoilt(data, path))
        try:
            if name == "tokenizer_config.json":
                Tokenizer.load(folder)
            else:
                load_weights(folder, read_config(folder), torch.float32, CPU, progress=False)
        except (CheckpointError, UnsupportedModel, InvalidConfig):
            pass
        finally:
            path.write_text(whole)

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
    (length,) = struct.unpack("<Q", whole[:8])

    @FEW
    @given(st.integers(0, length + 7), st.binary(min_size=1, max_size=3))
    def read(place: int, content: bytes) -> None:
        path.write_bytes(whole[:place] + content + whole[place + len(content) :])
        try:
            load_weights(folder, config, torch.float32, CPU, progress=False)
        except CheckpointError:
            pass
        finally:
            path.write_bytes(whole)

    read()
