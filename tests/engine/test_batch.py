"""Batches: every line gets one result, whatever is wrong with it, and a kill costs only what was in flight."""

import asyncio
import json
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from engine import batch
from engine.batch import Summary, run_batch
from engine.batches import batch_lines
from engine.batches.results_file import ResultsFile
from engine.config.config import BatchConfig, EngineConfig
from engine.errors import EngineStopped, InvalidConfig, StepFailed
from engine.tokenizer import Tokenizer
from tests.fakes.engine_client import FakeClient
from tests.fakes.tokenizers import byte_tokenizer

CODEC = Tokenizer(byte_tokenizer())
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def line(custom_id: str, model: str = "base", url: str = COMPLETIONS, **body: Any) -> str:
    asked = {"messages": [{"role": "user", "content": "hi"}]} if url == CHAT else {"prompt": "hi"}
    request = {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": model} | asked | body}
    return json.dumps(request)


def files(folder: Path, lines: Iterable[str]) -> BatchConfig:
    (folder / "in.jsonl").write_text("".join(f"{text}\n" for text in lines))
    engine = EngineConfig(progress=False)
    return BatchConfig(input=folder / "in.jsonl", output=folder / "out.jsonl", engine=engine, in_flight=3)


def run(config: BatchConfig, node: FakeClient | None = None) -> Summary:
    return asyncio.run(run_batch(node or FakeClient(CODEC), config))


def results(config: BatchConfig) -> list[dict[str, Any]]:
    return [json.loads(text) for text in config.output.read_text().splitlines()]


def test_both_endpoints_are_answered_each_line_under_its_own_adapter(tmp_path: Path) -> None:
    config = files(tmp_path, [line("a", "poet"), line("b", "team/coder", CHAT), line("c")])
    assert run(config) == Summary(answered=3)
    by_id = {result["custom_id"]: result for result in results(config)}
    assert by_id["a"]["response"]["body"]["choices"][0]["text"] == "poet heard hi"
    said = by_id["b"]["response"]["body"]["choices"][0]["message"]["content"]
    assert said == "team/coder heard user: hi\nassistant: "
    for result in by_id.values():
        assert set(result) == {"id", "custom_id", "response", "error"}
        assert set(result["response"]) == {"status_code", "request_id", "body"}
        assert (result["response"]["status_code"], result["error"]) == (200, None)


BAD = {
    "not json": "invalid_json",
    '["list"]': "invalid_type",
    '{"custom_id": "x", "method": "POST"}': "missing_field",
    line("").replace('"custom_id": "", ', ""): "missing_field",
    line(""): "invalid_value",
    line("first"): "duplicate_custom_id",
    line("e1", url="/v1/embeddings"): "unknown_url",
    line("e2").replace("POST", "GET"): "unknown_url",
    line("e3", "nope"): "model_not_found",
    line("e4", temperature="hot"): "invalid_type",
    line("e5", stream=True): "unsupported_value",
    line("e6", surprise=1): "unknown_field",
    line("e7", prompt="x" * 600): "context_length_exceeded",
}


def test_bad_lines_become_error_lines_and_the_rest_is_answered(tmp_path: Path) -> None:
    config = files(tmp_path, [line("first"), "", *BAD, line("last")])
    assert run(config) == Summary(answered=2, errors=len(BAD))
    found = results(config)
    assert sorted(r["error"]["code"] for r in found if r["error"]) == sorted(BAD.values())
    assert [r["custom_id"] for r in found if not r["error"]] == ["first", "last"]
    by_id = {r["custom_id"]: r for r in found}
    assert by_id["e3"]["response"]["status_code"] == 404
    assert by_id["e4"]["response"]["body"]["error"]["param"] == "temperature"
    assert by_id["e1"]["response"] is None
    before = config.output.read_bytes()
    assert run(config) == Summary(skipped=2 + len(BAD), skipped_errors=len(BAD))
    assert config.output.read_bytes() == before


def test_a_line_that_fails_in_the_engine_is_an_error_line(tmp_path: Path) -> None:
    node = FakeClient(CODEC)
    node.failure = StepFailed("the step failed")
    config = files(tmp_path, [line("a")])
    assert run(config, node) == Summary(errors=1)
    [result] = results(config)
    assert (result["response"]["status_code"], result["error"]["code"]) == (500, "engine_error")


@pytest.mark.parametrize("torn_bytes", [0, 1, 10, 10_000])
def test_a_killed_run_goes_on_where_it_was_torn(tmp_path: Path, torn_bytes: int) -> None:
    lines = [line(f"line-{number}") for number in range(20)]
    config = files(tmp_path, lines)
    run(config)
    whole = config.output.read_bytes().splitlines(keepends=True)
    kept, torn = whole[:7], whole[7][:torn_bytes].rstrip(b"\n")
    config.output.write_bytes(b"".join(kept) + torn)
    node = FakeClient(CODEC)
    assert run(config, node) == Summary(answered=13, skipped=7)
    assert len(node.submitted) == 13
    assert config.output.read_bytes().splitlines(keepends=True)[:7] == kept
    found = results(config)
    assert sorted(r["custom_id"] for r in found) == sorted(f"line-{number}" for number in range(20))


def test_lines_in_flight_are_bounded(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = FakeClient(CODEC)
        node.gate.clear()
        config = files(tmp_path, [line(f"line-{number}") for number in range(9)])
        running = asyncio.create_task(run_batch(node, config))
        while len(node.live) < config.in_flight:
            await node.gate_reached.wait()
            node.gate_reached.clear()
        assert len(node.submitted) == config.in_flight
        node.gate.set()
        assert await running == Summary(answered=9)

    asyncio.run(scenario())


def test_a_stopped_run_leaves_whole_lines_and_nothing_running(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = FakeClient(CODEC)
        node.says = lambda model, prompt: "ok"
        node.gate.clear()
        node.gate_after = 3
        config = files(tmp_path, [line("short", max_tokens=1), line("long")])
        running = asyncio.create_task(run_batch(node, config))
        await node.gate_reached.wait()
        while not results(config):
            await asyncio.sleep(0.001)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert node.live == {}
        assert [result["custom_id"] for result in results(config)] == ["short"]

    asyncio.run(scenario())


def test_an_answer_that_is_being_written_when_the_run_is_stopped_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, stopped, append = threading.Event(), threading.Event(), ResultsFile.append

    def slow_append(file: ResultsFile, result: object) -> None:
        begun.set()
        assert stopped.wait(10)
        append(file, result)

    async def scenario() -> None:
        config = files(tmp_path, [line("short")])
        running = asyncio.create_task(run_batch(FakeClient(CODEC), config))
        assert await asyncio.to_thread(begun.wait, 10)
        running.cancel()
        asyncio.get_running_loop().call_later(0.05, stopped.set)
        with pytest.raises(asyncio.CancelledError):
            await running
        assert [result["custom_id"] for result in results(config)] == ["short"]

    monkeypatch.setattr(ResultsFile, "append", slow_append)
    asyncio.run(scenario())


def test_a_line_that_is_too_long_is_an_error_and_the_next_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_lines, "MAX_LINE_BYTES", 200)
    config = files(tmp_path, [line("a"), line("b", user="x" * 500), line("c")])
    assert run(config) == Summary(answered=2, errors=1)
    assert [r["error"]["code"] for r in results(config) if r["error"]] == ["line_too_long"]


def test_a_file_without_a_last_line_break_and_one_with_crlf_are_read(tmp_path: Path) -> None:
    config = files(tmp_path, [])
    config.input.write_text(f"{line('a')}\r\n\r\n{line('b')}")
    assert run(config) == Summary(answered=2)


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    config = files(tmp_path, [line("a")])
    with pytest.raises(InvalidConfig, match="input"):
        run(BatchConfig(tmp_path / "missing", config.output, config.engine))
    with pytest.raises(InvalidConfig, match="it is the input"):
        run(BatchConfig(config.input, config.input, config.engine))
    with pytest.raises(InvalidConfig, match="cannot be written"):
        run(BatchConfig(config.input, tmp_path / "no" / "folder", config.engine))


def test_the_command_refuses_files_before_it_loads_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(config: EngineConfig) -> None:
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr(batch, "assemble", load)
    config = files(tmp_path, [line("a")])
    refusals = {
        (tmp_path / "missing", config.output): "input=",
        (config.input, config.input): "output=",
        (config.input, tmp_path): "output=",
        (config.input, tmp_path / "no" / "folder"): "output=",
    }
    for (source, sink), field in refusals.items():
        assert batch.main(["-i", str(source), "-o", str(sink)]) == batch.USAGE_ERROR
        told = capsys.readouterr().err
        assert told.startswith(f"python -m engine.batch: {field}")
        assert told.count("\n") == 1


def test_a_malformed_line_is_called_a_line(tmp_path: Path) -> None:
    config = files(tmp_path, ["not json", '["list"]', line("a").replace('{"model"', "{model")])
    run(config)
    told = [result["error"]["message"] for result in results(config)]
    assert [message.startswith("the line") for message in told] == [True] * 3


@pytest.mark.parametrize(
    "content", ["not a result", "not a result\n", '{"some": "json"}', '{"custom_id": null}\n']
)
def test_a_results_file_that_is_none_is_left_as_it_is(tmp_path: Path, content: str) -> None:
    config = files(tmp_path, [line("a")])
    config.output.write_text(content)
    with pytest.raises(InvalidConfig, match="line 1 is no batch result"):
        run(config)
    assert config.output.read_text() == content


def test_an_engine_that_stopped_ends_the_run_and_leaves_its_lines_to_the_next(tmp_path: Path) -> None:
    config = files(tmp_path, [line(name) for name in ("a", "b", "c", "d", "e")])
    node = FakeClient(CODEC)
    node.refusal = EngineStopped(KeyError("books"))
    with pytest.raises(EngineStopped, match="KeyError"):
        run(config, node)
    assert results(config) == []
    assert run(config) == Summary(answered=5)
