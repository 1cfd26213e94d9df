"""Options that nobody can honour end in one line that names them, whatever part of the engine notices."""

import json
from pathlib import Path

import pytest

from engine import serve
from engine.assembly.tokenizer_loading import load_tokenizer
from engine.demo.embedded import DEMO_BASE
from engine.errors import InvalidConfig
from engine.tokenizer import TokenizerFailed


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ["--kv-cache-bytes", "100TiB"],
            "kv_cache_bytes=109951162777600 is not accepted: the device cannot give",
        ),
        (["--kv-cache-bytes", "99999999999TiB"], "kv_cache_bytes="),
        (
            ["--adapter-bytes", "100TiB"],
            "adapter_bytes=109951162777600 is not accepted: the device cannot give",
        ),
        (["--max-model-len", "1"], "max_model_len=1 is not accepted: give a whole number from 2"),
        (
            ["--adapter-cache-dir", "/proc/none"],
            "adapter_cache_dir='/proc/none' is not accepted: the folder cannot be used",
        ),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else "",
)
def test_an_absurd_option_is_told_in_one_line(
    options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    small = [] if "--kv-cache-bytes" in options else ["--kv-cache-bytes", "1MiB"]
    assert serve.main([*options, *small, "--port", "0", "--no-progress"]) == serve.USAGE_ERROR
    told = capsys.readouterr().err
    assert told.startswith(f"python -m engine.serve: {says}")
    assert told.count("\n") == 1


class Panicking:
    """A library's tokenizer that panics as the one written in Rust does: no Exception, but a BaseException."""

    def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> None:
        raise type("PanicException", (BaseException,), {})("index out of bounds")


def test_a_tokenizer_that_panics_ends_one_text_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(DEMO_BASE)
    monkeypatch.setattr(tokenizer, "_backend", Panicking())
    with pytest.raises(TokenizerFailed, match="index out of bounds"):
        tokenizer.encode("x")


def test_a_tokenizer_that_panics_on_common_text_is_refused_at_start(tmp_path: Path) -> None:
    for path in DEMO_BASE.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = json.loads((DEMO_BASE / "tokenizer.json").read_text())
    content["post_processor"]["special_tokens"].clear()
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InvalidConfig, match="its tokenizer cannot be read: the tokenizer failed"):
        load_tokenizer(tmp_path)
