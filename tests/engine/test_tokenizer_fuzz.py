"""Whatever a tokenizer's files hold, the model is served or refused in one line: no traceback, no endless wait."""

import json
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import InvalidConfig
from engine.tokenizer import Tokenizer
from tests.chance import examples
from tests.fakes.tokenizers import byte_tokenizer, merging_tokenizer

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
VALUES: list[Any] = [
    None,
    True,
    0,
    -1,
    2**70,
    0.5,
    "",
    "x" * 50,
    [],
    {},
    [[]],
    {"type": "Sequence"},
    "\ud800",
    "\u0000",
]


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
            return Tokenizer.load(folder)
        except InvalidConfig as error:
            refusal = error
    assert refusal.field == "model"
    assert "\n" not in str(refusal).encode().decode()
    return None


def place(value: Any, chance: st.DataObject) -> Any:
    """Put a value that does not belong there somewhere into a JSON value."""
    if not isinstance(value, dict | list) or not value or chance.draw(st.integers(0, 4)) == 0:
        return chance.draw(st.sampled_from(VALUES))
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = chance.draw(st.sampled_from(keys))
    copied = value.copy()
    if chance.draw(st.integers(0, 5)) == 0:
        del copied[key]
    else:
        copied[key] = place(value[key], chance)
    return copied


@settings(deadline=None, max_examples=examples(60))
@given(name=st.sampled_from(FILES[:2]), chance=st.data())
def test_a_file_with_a_wrong_value_is_served_or_refused(
    files: dict[str, bytes], name: str, chance: st.DataObject
) -> None:
    wrong = json.dumps(place(json.loads(files[name]), chance)).encode()
    if (made := load(files | {name: wrong})) is not None:
        made.decode(made.encode("Hello, world 1"))


@settings(deadline=None, max_examples=examples(25))
@given(name=st.sampled_from(FILES), chance=st.data())
def test_a_file_with_wrong_bytes_is_served_or_refused(
    files: dict[str, bytes], name: str, chance: st.DataObject
) -> None:
    content = files[name]
    start = chance.draw(st.integers(0, len(content)))
    end = chance.draw(st.integers(start, min(len(content), start + 20)))
    load(files | {name: content[:start] + chance.draw(st.binary(max_size=8)) + content[end:]})
