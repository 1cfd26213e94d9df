"""Whatever a tokenizer's files hold, the model is served or refused in one line: no traceback, no endless wait."""

import json
import random
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.assembly.tokenizer_loading import load_tokenizer
from engine.errors import InvalidConfig
from engine.tokenizer import Tokenizer
from scripts.fuzz.mutators import spoilt_bytes, spoilt_value
from tests.chance import chances, examples
from tests.fakes.tokenizers import byte_tokenizer, merging_tokenizer

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("model")
    byte_tokenizer().save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    merging = json.loads(merging_tokenizer()._backend.to_str())
    content["model"] = merging["model"]  # with merges
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    return found | {"tokenizer.json": json.dumps(content).encode()}


def load(files: dict[str, bytes]) -> Tokenizer | None:
    """Load a folder with these files; None if it is refused as it should be."""
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        try:
            return load_tokenizer(folder)
        except InvalidConfig as error:
            refusal = error
    assert refusal.field == "model"
    assert "\n" not in str(refusal).encode().decode()
    return None


@settings(deadline=None, max_examples=examples(60))
@given(name=st.sampled_from(FILES[:2]), chance=chances())
def test_a_file_with_a_wrong_value_is_served_or_refused(
    files: dict[str, bytes], name: str, chance: random.Random
) -> None:
    wrong = json.dumps(spoilt_value(chance, json.loads(files[name]))).encode()
    if (made := load(files | {name: wrong})) is not None:
        made.decode(made.encode("Hello, world 1"))


@settings(deadline=None, max_examples=examples(25))
@given(name=st.sampled_from(FILES), chance=chances())
def test_a_file_with_wrong_bytes_is_served_or_refused(
    files: dict[str, bytes], name: str, chance: random.Random
) -> None:
    load(files | {name: spoilt_bytes(chance, files[name])})
