"""Adapters by URL in Python, in a batch file and at a server's start: the same rule as over HTTP."""

import json
from collections.abc import Generator
from pathlib import Path
from shutil import copytree

import pytest

from engine import LLM, LoRARequest, SamplingParams
from engine.batch import main as batch
from engine.config.source_config import SourceConfig
from engine.errors import InvalidConfig
from lora.errors import AdapterRefused
from scheduler.request import InvalidParameter
from tests.lora.sources.source_server import SourceServer, source_server

ADAPTERS = Path("engine/demo/adapters").resolve()
SMALL = {"max_model_len": 64, "kv_cache_bytes": 1 << 20, "self_test": False, "dtype": "float32"}
GREEDY = SamplingParams(temperature=0, max_tokens=24)
ASK = [{"role": "user", "content": "garden"}]


@pytest.fixture
def server(tmp_path: Path) -> Generator[SourceServer]:
    with source_server(tmp_path / "served") as running:
        for name in ("reverse", "upper"):
            copytree(ADAPTERS / name, running.root / f"far-{name}")
        yield running


def test_python_takes_urls_where_it_takes_folders(server: SourceServer) -> None:
    sources = SourceConfig((server.url,), f"{server.url}/{{name}}")
    with LLM(loras={"far": f"{server.url}/far-reverse"}, sources=sources, **SMALL) as llm:  # pyright: ignore[reportArgumentType, reportCallIssue]
        asked = LoRARequest("other", 1, f"{server.url}/far-upper")
        answers = [
            llm.chat(ASK, GREEDY, adapters="far"),
            llm.chat(ASK, GREEDY, lora_request=asked),
            llm.chat(ASK, GREEDY, lora_request=asked),  # it is known by then
            llm.chat(ASK, GREEDY, adapters="far-upper"),
        ]
        texts = [each.outputs[0].text for (each,) in answers]
    assert texts == ["nedrag", "GARDEN", "GARDEN", "GARDEN"]
    assert [path for path, _ in server.asked].count("/far-upper/adapter_config.json") == 2


def test_python_fetches_only_what_was_named_or_allowed(server: SourceServer) -> None:
    with LLM(loras={"far": f"{server.url}/far-reverse"}, **SMALL) as llm:  # pyright: ignore[reportArgumentType, reportCallIssue]
        with pytest.raises(AdapterRefused, match="--lora-source"):
            llm.chat(ASK, GREEDY, lora_request=LoRARequest("other", 1, f"{server.url}/far-upper"))
        with pytest.raises(InvalidParameter) as refusal:
            llm.chat(ASK, GREEDY, lora_request=LoRARequest("other", 1, "http://u:hunter2@host/a"))
    assert "hunter2" not in str(refusal.value)


def test_what_an_operator_names_must_be_there(server: SourceServer) -> None:
    with pytest.raises(AdapterRefused, match="hidden") as refusal:
        LLM(loras={"far": f"{server.url}/nowhere?sig=hunter2"}, **SMALL)  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert "hunter2" not in str(refusal.value)
    with pytest.raises(InvalidConfig) as config:
        LLM(loras={"far": "https://u:hunter2@host/a"}, **SMALL)  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert "hunter2" not in str(config.value)


@pytest.mark.parametrize("timeout_s", [0.0, 241.0])
def test_a_source_may_not_take_longer_than_requests_wait(timeout_s: float) -> None:
    with pytest.raises(InvalidConfig, match="lora_source_timeout_s"):
        SourceConfig(timeout_s=timeout_s)


def test_a_batch_file_names_adapters_by_the_template(tmp_path: Path, server: SourceServer) -> None:
    body = {"model": "far-reverse", "messages": ASK, "temperature": 0, "max_tokens": 24}
    line = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    (tmp_path / "in.jsonl").write_text(json.dumps(line) + "\n")
    options = ["--lora-source-template", f"{server.url}/{{name}}", "--no-progress", "--no-self-test"]
    small = ["--max-model-len", "64", "--kv-cache-bytes", "1MiB", "--dtype", "float32"]
    assert batch(["-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), *options, *small]) == 0
    (result,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert result["response"]["body"]["choices"][0]["message"]["content"] == "nedrag"
