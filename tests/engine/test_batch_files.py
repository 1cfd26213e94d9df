"""The files of a batch: what is wrong with a line or a disk costs that much, is told, and leaves the rest usable."""

import asyncio
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from engine import batch
from engine.batch import Summary, run_batch
from engine.batches.results_file import RESULT_PREFIX, open_results_file
from engine.config.config import BatchConfig, EngineConfig, ServeConfig
from engine.errors import InvalidConfig, OutputFailed
from tests.engine.test_batch import CODEC, files, line, results, run
from tests.fakes.engine_client import FakeClient

ROOT = Path(__file__).parents[2]
DEMO = json.dumps(
    {
        "custom_id": "demo",
        "method": "POST",
        "url": "/v1/completions",
        "body": {"model": "demo", "prompt": "garden", "max_tokens": 2},
    }
)
BROKEN = {
    '{"custom_id": "a", "method": "POST", "url": "/v1/completions"}': "body",
    line("a")[:-1] + ', "surprise": 1}': "surprise",
    line("a").replace('"POST"', "5"): "method",
    line("a").replace('"POST"', "null"): "method",
    line("a").replace("POST", "GET"): "give 'POST'",
    line("a").replace("/v1/completions", "/v1/embeddings"): "give /v1/completions",
    line("a").replace("/v1/completions", "completions"): "'completions'",
    line("a").replace('"body": {', '"body": [{').replace("}}", "}]}"): "expected object",
    line("a") + "}": "not JSON",
    line("a")[:-9]: "not JSON",
    line("a").replace("hi", "hi\x00"): "not JSON",
    line("a").replace("hi", "\\ud800"): "not JSON",
    line("a").replace("hi", "x" * 600): "",
}


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_line_keeps_its_name_and_says_what_is_wrong(tmp_path: Path, text: str) -> None:
    config = files(tmp_path, [text, line("b")])
    assert run(config) == Summary(answered=1, errors=1)
    by_id = {result["custom_id"]: result for result in results(config)}
    assert set(by_id) == {"a", "b"}
    assert BROKEN[text] in by_id["a"]["error"]["message"]
    assert run(config) == Summary(skipped=2, skipped_errors=1)


@pytest.mark.parametrize(
    "text", ["not json", "[]", "5", '{"custom_id": 5}', '{"x": "custom_id"}', '{"custom_id": "\\ud800"}']
)
def test_a_line_without_a_name_is_told_by_its_number(tmp_path: Path, text: str) -> None:
    config = files(tmp_path, [line("b"), text])
    assert run(config) == Summary(answered=1, errors=1)
    (failed,) = (result for result in results(config) if result["error"])
    assert failed["custom_id"] is None
    assert failed["error"]["line"] == 2


def test_the_clients_own_metadata_beside_the_body_asks_for_nothing(tmp_path: Path) -> None:
    config = files(tmp_path, [line("a")[:-1] + ', "metadata": {"any": ["thing"]}}'])
    assert run(config) == Summary(answered=1)


def test_a_byte_order_mark_costs_no_line_and_another_encoding_is_named(tmp_path: Path) -> None:
    config = files(tmp_path, [])
    config.input.write_bytes(f"{line('a')}\n{line('b')}\n".encode("utf-8-sig"))
    assert run(config) == Summary(answered=2)
    config.input.write_bytes(line("a").encode("utf-16"))
    with pytest.raises(InvalidConfig, match="UTF-16: save it as UTF-8"):
        run(config)


def test_a_line_that_is_too_long_keeps_the_name_that_it_begins_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.batches.batch_lines.MAX_LINE_BYTES", 200)
    config = files(tmp_path, [line("a", user="x" * 500)])
    run(config)
    (result,) = results(config)
    assert (result["custom_id"], result["error"]["code"]) == ("a", "line_too_long")


def test_errors_are_told_once_each_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = files(tmp_path, [line("a"), line("a"), *(line(f"b{n}", "nope") for n in range(30))])
    assert run(config).failed == 31
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("line 2 ('a'): custom_id: 'a' was given before")
    assert len(told) == 21
    assert "in the results only" in told[-1]


def test_errors_are_retried_only_if_asked_and_their_results_are_replaced(tmp_path: Path) -> None:
    config = files(tmp_path, [line("a"), line("b", "late"), "not json", line("c")])
    assert run(config) == Summary(answered=2, errors=2)
    kept = [text for text in config.output.read_bytes().splitlines(keepends=True) if b'"error":null' in text]
    config.output.write_bytes(config.output.read_bytes() + b'{"id":"batch_req_torn')
    node = FakeClient(CODEC, adapters=("late",))
    again = BatchConfig(config.input, config.output, config.engine, retry_errors=True)
    assert run(again, node) == Summary(answered=1, errors=1, skipped=2)
    assert [model for model, _, _ in node.submitted] == ["late"]
    assert config.output.read_bytes().splitlines(keepends=True)[:2] == kept
    assert sorted(str(result["custom_id"]) for result in results(config)) == ["None", "a", "b", "c"]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["in.jsonl", "out.jsonl"]


def test_a_results_file_that_another_run_writes_is_refused(tmp_path: Path) -> None:
    config = files(tmp_path, [line("a")])
    with open_results_file(config.output), pytest.raises(InvalidConfig, match="another run writes it"):
        run(config)


def run_on_a_full_disk(config: BatchConfig, num_bytes: int) -> None:
    """Have the system refuse what makes a file longer than `num_bytes`."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, old[1]))
    try:
        with pytest.raises(OutputFailed, match=r"output=.*cannot be written .*run the same command again"):
            run(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("num_bytes", [0, 1, 100, 1500, 2000])
def test_a_full_disk_ends_the_run_with_whole_lines_and_the_next_goes_on(
    tmp_path: Path, num_bytes: int
) -> None:
    config = files(tmp_path, [line(f"line-{number}") for number in range(20)])
    run_on_a_full_disk(config, num_bytes)
    written = config.output.read_bytes()
    assert written == b"" or written.endswith(b"\n")
    done = len(results(config))
    assert run(config) == Summary(answered=20 - done, skipped=done)
    assert sorted(r["custom_id"] for r in results(config)) == sorted(f"line-{n}" for n in range(20))


def test_once_writing_failed_nothing_is_written_after_what_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        """A file on a disk that is full once, and keeps what it took before."""

        def __init__(self, file: Any) -> None:
            self.file, self.full = file, True

        def seek(self, place: int, whence: int = 0) -> int:
            return self.file.seek(place, whence)

        def write(self, content: bytes) -> int:
            if self.full:
                self.full = False
                self.file.write(content[:5])
                raise OSError(errno.EIO, "Input/output error")
            return self.file.write(content)

        def fileno(self) -> int:
            return self.file.fileno()

        def truncate(self, size: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

    path = tmp_path / "out.jsonl"
    with open_results_file(path) as results_file:
        monkeypatch.setattr(results_file, "_file", Full(results_file._file))
        for _ in range(2):
            with pytest.raises(OutputFailed, match="Input/output error"):
                results_file.append({"id": RESULT_PREFIX + "1", "custom_id": "a", "error": None})
    assert len(path.read_bytes()) == 5


def command(config: BatchConfig, output: str | Path) -> list[str]:
    engine = ["--no-progress", "--max-model-len", "64", "--kv-cache-bytes", "4MiB"]
    return [sys.executable, "-m", "engine.batch", "-i", str(config.input), "-o", str(output), *engine]


def test_a_device_a_pipe_and_a_read_only_file_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(config: EngineConfig) -> None:
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr(batch, "assemble", load)
    config = files(tmp_path, [line("a")])
    os.mkfifo(tmp_path / "pipe")
    for source, sink in (
        (config.input, Path("/dev/full")),
        (config.input, tmp_path / "pipe"),
        (tmp_path / "pipe", config.output),
        (config.input, Path("/proc/version")),
    ):
        assert batch.main(["-i", str(source), "-o", str(sink)]) == batch.USAGE_ERROR
        told = capsys.readouterr().err
        assert told.count("\n") == 1, told
        assert str(sink if source == config.input else source) in told


@pytest.mark.slow
def test_the_exit_code_tells_whether_all_is_answered_even_to_a_closed_pipe(tmp_path: Path) -> None:
    config = files(tmp_path, [DEMO, "not json"])
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(
        command(config, config.output),
        cwd=ROOT,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert ended.returncode == batch.LINES_FAILED
    assert "Traceback" not in ended.stderr
    assert "line 2" in ended.stderr
    assert len(results(config)) == 2


def test_a_line_may_ask_for_more_sequences_than_a_server_lets_wait(tmp_path: Path) -> None:
    asked = json.loads(DEMO)
    asked["body"] |= {"prompt": ["a"] * 3, "n": 100, "max_tokens": 1}
    config = files(tmp_path, [json.dumps(asked)])
    assert batch.main(command(config, config.output)[3:]) == 0
    (result,) = results(config)
    assert len(result["response"]["body"]["choices"]) == 300 > ServeConfig().max_waiting


@pytest.mark.slow
def test_a_signal_ends_the_run_cleanly_and_the_next_goes_on(tmp_path: Path) -> None:
    body = {"model": "demo", "prompt": "garden", "max_tokens": 50, "ignore_eos": True}
    lines = [
        DEMO.replace("demo", f"line-{n}", 1).split('"body"')[0] + f'"body": {json.dumps(body)}}}'
        for n in range(4000)
    ]
    config = files(tmp_path, lines)
    child = subprocess.Popen(command(config, config.output), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline_s = time.monotonic() + 120
    while not (config.output.exists() and config.output.stat().st_size) and time.monotonic() < deadline_s:
        assert child.poll() is None
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)  # which takes the way of SIGINT
    _, told = child.communicate(timeout=60)
    assert child.returncode == batch.INTERRUPTED
    assert told == "python -m engine.batch: interrupted: run the same command again to go on\n"
    done = results(config)
    assert 0 < len(done) < 4000
    config.input.write_text("".join(f"{text}\n" for text in lines[: len(done) + 1]))
    node = FakeClient(CODEC)
    node.model_name = "demo"
    assert asyncio.run(run_batch(node, config)).answered <= len(done) + 1
