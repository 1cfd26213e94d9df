"""Roles that compute nothing start without torch: a process imports it only to hold weights."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer as RawTokenizer
from transformers import AutoTokenizer

from engine.demo.embedded import DEMO_BASE
from engine.text.tokenizer_files import read_tokenizer

_HEAVY = ("torch", "safetensors")
_DEMO_TOKENIZER = """
from engine.assembly.tokenizer_loading import load_tokenizer
from engine.demo.embedded import DEMO_BASE
load_tokenizer(DEMO_BASE).close()
"""


def _imported(program: str) -> set[str]:
    """Run a program in a process of its own, and return which of the heavy libraries it imported."""
    shown = f"{program}\nimport sys\nprint(*(name for name in {_HEAVY} if name in sys.modules))"
    ran = subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True, check=True)
    return set(ran.stdout.split())


@pytest.mark.slow
@pytest.mark.parametrize(
    "program",
    [
        "import engine.serve, engine.cluster.roles.coordinator_role",
        "import engine.serve, engine.cluster.roles.router_role" + _DEMO_TOKENIZER,
    ],
    ids=["coordinator", "router"],
)
def test_a_role_that_computes_nothing_imports_no_torch(program: str) -> None:
    assert _imported(program) == set()


def test_the_check_sees_what_is_imported() -> None:
    assert _imported("import safetensors") == {"safetensors"}


@pytest.mark.parametrize("named", ["PreTrainedTokenizerFast", "TokenizersBackend"])
def test_a_tokenizer_that_is_read_without_torch_is_the_one_that_transformers_chooses(
    tmp_path: Path, named: str
) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((DEMO_BASE / name).read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": named}))
    ours, theirs = read_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert type(ours) is type(theirs)
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.chat_template == theirs.chat_template
    raw: tuple[RawTokenizer, RawTokenizer] = (ours.backend_tokenizer, theirs.backend_tokenizer)
    assert raw[0].to_str() == raw[1].to_str()
