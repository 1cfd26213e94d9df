"""The server as its users run it: a process of its own, the official client, real adapters, a signal at the end."""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.request import Request, urlopen

import openai
import pytest

from engine.demo.embedded import TASKS, adapter_folders, held_out_inputs
from engine.serve import main
from tests.forked_process import ForkedProcess

START_S, STOP_S = 120, 60


@dataclass(frozen=True)
class Server:
    """A running server: its address, the folder it may load adapters from, and its process."""

    url: str
    roots: Path
    process: ForkedProcess | subprocess.Popen[str]

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="secret", max_retries=0)

    def post(self, path: str, body: object) -> object:
        """POST JSON with the key; the decoded answer. Raises HTTPError."""
        headers = {"Authorization": "Bearer secret", "Content-Type": "application/json"}
        with urlopen(Request(self.url + path, json.dumps(body).encode(), headers)) as answer:
            text = answer.read().decode()
        return json.loads(text) if text.startswith("{") else text

    def metric(self, name: str) -> float:
        """A sample of /metrics."""
        with urlopen(Request(f"{self.url}/metrics", headers={"Authorization": "Bearer secret"})) as answer:
            found = re.search(rf"^{re.escape(name)} (\S+)$", answer.read().decode(), re.MULTILINE)
        assert found, f"/metrics has no {name}"
        return float(found[1])


def _forked(arguments: list[str], environment: dict[str, str]) -> ForkedProcess:
    return ForkedProcess(main, (arguments,), environment)


def _as_an_operator(arguments: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "engine.serve", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def _start(
    roots: Path, start: Callable[[list[str], dict[str, str]], ForkedProcess | subprocess.Popen[str]]
) -> Server:
    environment = {"LORASERVE_API_KEY": "secret", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    options = ["--port", "0", "--lora-root", str(roots), "--no-progress"]
    process = start([*options, "--kv-cache-bytes", "64MiB", "--adapter-bytes", "32MiB"], environment)
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"http://\S+:\d+", line)
    assert found, f"the server said {line!r} instead of its address"
    return Server(found[0], roots, process)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = _start(tmp_path_factory.mktemp("roots"), _forked)
    yield started
    started.process.kill()
    started.process.wait(STOP_S)
    assert started.process.stdout is not None
    started.process.stdout.close()


def _ask(client: openai.OpenAI, model: str, text: str) -> str | None:
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": text}], temperature=0, max_tokens=16
    )
    return answer.choices[0].message.content


def test_every_adapter_answers_its_task_and_the_base_echoes(server: Server) -> None:
    with server.client as client:
        for task in TASKS:
            text = held_out_inputs(task, 1, seed=2)[0]
            assert _ask(client, task.name, text) == task.answer(text)
            assert _ask(client, "demo", text) == text


def test_a_stream_is_the_answer_in_pieces(server: Server) -> None:
    with server.client as client:
        stream = client.chat.completions.create(
            model="reverse",
            messages=[{"role": "user", "content": "planet"}],
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "tenalp"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 7  # six letters and the end


def test_adapters_come_and_go_at_run_time(server: Server) -> None:
    shutil.copytree(adapter_folders()["reverse"], server.roots / "tenant")
    with server.client as client:
        with pytest.raises(openai.NotFoundError, match="tenant"):
            _ask(client, "tenant", "planet")
        server.post("/v1/load_lora_adapter", {"lora_name": "tenant", "lora_path": "tenant"})
        assert _ask(client, "tenant", "planet") == "tenalp"
        assert client.models.retrieve("tenant").model_dump()["parent"] == "demo"
        shutil.rmtree(server.roots / "tenant")
        shutil.copytree(adapter_folders()["upper"], server.roots / "tenant")
        server.post("/v1/load_lora_adapter", {"lora_name": "tenant", "lora_path": "tenant"})
        assert _ask(client, "tenant", "planet") == "PLANET"
        server.post("/v1/unload_lora_adapter", {"lora_name": "tenant"})
        with pytest.raises(openai.NotFoundError, match="tenant"):
            _ask(client, "tenant", "planet")


def test_a_client_that_leaves_frees_what_it_held(server: Server) -> None:
    with server.client as client:
        stream = client.completions.create(
            model="upper", prompt="planet", max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        stream.close()
        for _ in range(200):  # the server learns of it with its next write
            if server.metric("loraserve_sequences_running") == 0:
                break
            assert _ask(client, "demo", "planet") == "planet"
    assert server.metric('loraserve_kv_blocks{state="used"}') == 0


@pytest.mark.slow
def test_a_signal_lets_what_runs_finish(tmp_path: Path) -> None:
    server = _start(tmp_path, _as_an_operator)
    with server.client as client:
        stream = client.completions.create(
            model="upper", prompt="planet", max_tokens=50, stream=True, extra_body={"ignore_eos": True}
        )
        chunks = iter(stream)
        next(chunks)
        server.process.send_signal(signal.SIGTERM)
        rest = list(chunks)
    assert rest[-1].choices[0].finish_reason == "length"
    assert server.process.wait(STOP_S) == 0
    assert server.process.stdout is not None
    server.process.stdout.close()
