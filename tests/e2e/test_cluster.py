"""A cluster that one command starts: it answers, outlives its processes, and ends when told to."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree
from typing import Any

import psutil
import pytest

from tests.lora.sources.source_server import source_server

READY_S = 60.0
ADAPTERS = Path("engine/demo/adapters").resolve()


def free_port() -> int:
    """Return a port of this machine that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class LiveCluster:
    """The launcher's process, and the router's address."""

    def __init__(self, folder: Path, sources: str) -> None:
        self.port = free_port()
        self.registry = folder / "registry.sqlite"
        self._log = (folder / "log").open("wb")
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "engine.serve", "--nodes", "2", "--routers", "2"),
                *("--port", str(self.port)),
                *("--dtype", "float32", "--drain-s", "5", "--slo-ttft-s", "30", "--slo-tbt-s", "5"),
                *("--no-progress", "--registry-file", str(self.registry)),
                *("--lora-source", sources, "--lora-source-template", f"{sources}/{{name}}"),
                *("--lora-push-dir", str(folder / "pushed")),
            ],
            stdout=self._log,
            stderr=self._log,
        )

    def part(self, name: str) -> psutil.Process:
        """Find a process of the cluster by its name."""
        for child in psutil.Process(self.process.pid).children():
            line = child.cmdline()
            if name in line or f"--role={name}" in line:
                return child
        raise AssertionError(f"{name} does not run")

    def ask(self, path: str, body: dict[str, object] | None = None, router: int = 0) -> Any:
        """Return a response's JSON."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port + router}{path}",
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.loads(response.read())

    def chat(self, model: str, text: str, router: int = 0) -> str:
        """Return a greedy answer."""
        messages = [{"role": "user", "content": text}]
        answer = self.ask(
            "/v1/chat/completions",
            {"model": model, "messages": messages, "temperature": 0, "max_tokens": 40},
            router,
        )
        return str(answer["choices"][0]["message"]["content"])

    def wait_ready(self) -> None:
        """Wait until the routers are told ready: then they can serve. Wait also until they know the adapters."""
        deadline_s, log = time.monotonic() + READY_S, Path(self._log.name)
        for router in (0, 1):
            while f"router ready at http://127.0.0.1:{self.port + router}: " not in log.read_text():
                assert self.process.poll() is None, log.read_text()
                assert time.monotonic() < deadline_s, log.read_text()
                time.sleep(0.1)
            assert self.ask("/health", router=router) == {"status": "ok"}
            while len(self.ask("/v1/models", router=router)["data"]) <= 8:
                assert time.monotonic() < deadline_s, log.read_text()
                time.sleep(0.1)

    def wait_for(self, name: str) -> None:
        """Wait until the router has heard of a name."""
        deadline_s = time.monotonic() + READY_S
        while name not in [model["id"] for model in self.ask("/v1/models")["data"]]:
            assert time.monotonic() < deadline_s
            time.sleep(0.05)

    def stop(self) -> int:
        """Tell it to end; return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        self._log.close()
        return code


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveCluster]:
    """A router, a coordinator and two nodes, and a server of adapters' files."""
    served = tmp_path_factory.mktemp("served")
    for name in ("reverse", "upper"):
        copytree(ADAPTERS / name, served / f"far-{name}")
    with source_server(served) as server:
        yield from run_cluster(tmp_path_factory.mktemp("cluster"), server.url)


def run_cluster(folder: Path, sources: str) -> Iterator[LiveCluster]:
    """Run a cluster, and see to it that it ends as a whole."""
    live = LiveCluster(folder, sources)
    try:
        live.wait_ready()
        yield live
    finally:
        pids = [child.pid for child in psutil.Process(live.process.pid).children()]
        assert live.stop() == 0
        assert not any(psutil.pid_exists(pid) for pid in pids), "a process outlives the command"


def test_every_adapter_answers_through_the_router(cluster: LiveCluster) -> None:
    assert cluster.chat("reverse", "garden") == "nedrag"
    assert cluster.chat("upper", "garden") == "GARDEN"
    with pytest.raises(urllib.error.HTTPError, match="404"):
        cluster.chat("nobody", "garden")


def test_what_one_router_is_told_to_hold_no_router_answers(cluster: LiveCluster) -> None:
    cluster.ask("/v1/adapters/hold", {"name": "reverse", "seconds": 60})
    for router in (0, 1):
        with pytest.raises(urllib.error.HTTPError, match="503"):
            cluster.chat("reverse", "garden", router)
    cluster.ask("/v1/adapters/release", {"name": "reverse"}, router=1)
    assert [cluster.chat("reverse", "garden", router) for router in (0, 1)] == ["nedrag"] * 2


def test_an_adapter_comes_from_its_source_through_the_router(cluster: LiveCluster) -> None:
    assert cluster.chat("far-reverse", "garden") == "nedrag"  # nobody has loaded it
    source = str(cluster.ask("/v1/adapters/far-reverse")["source"])
    cluster.ask(
        "/v1/load_lora_adapter", {"lora_name": "other", "lora_path": source.replace("reverse", "upper")}
    )
    cluster.wait_for("other")
    assert cluster.chat("other", "garden") == "GARDEN"
    with pytest.raises(urllib.error.HTTPError, match="403"):
        cluster.ask("/v1/load_lora_adapter", {"lora_name": "bad", "lora_path": "http://127.0.0.1:1/a"})
    with pytest.raises(urllib.error.HTTPError, match="404"):
        cluster.chat("far-nobody", "garden")


def test_an_adapter_is_sent_through_the_router(cluster: LiveCluster) -> None:
    files = {"config": "adapter_config.json", "weights": "adapter_model.safetensors"}
    body = b"".join(
        f'--b\r\nContent-Disposition: form-data; name="{part}"; filename="f"\r\n\r\n'.encode()
        + (ADAPTERS / "upper" / file).read_bytes()
        + b"\r\n"
        for part, file in files.items()
    )
    request = urllib.request.Request(
        f"http://127.0.0.1:{cluster.port}/v1/adapters/sent",
        body + b"--b--\r\n",
        {"Content-Type": "multipart/form-data; boundary=b"},
        method="PUT",
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        digest = json.loads(response.read())["digest"]
    assert cluster.ask(f"/v1/adapters/sent@{digest[:16]}")["alias_of"] == "sent"
    cluster.wait_for("sent")
    assert cluster.chat("sent", "garden") == "GARDEN"


@pytest.mark.slow
def test_a_stream_outlives_its_node_and_the_node_comes_back(cluster: LiveCluster) -> None:
    body: dict[str, object] = {
        "model": "reverse", "prompt": "garden", "max_tokens": 600, "temperature": 0, "ignore_eos": True,
    }  # fmt: skip
    expected = cluster.ask("/v1/completions", body)["choices"][0]["text"]
    request = urllib.request.Request(
        f"http://127.0.0.1:{cluster.port}/v1/completions",
        json.dumps(body | {"stream": True}).encode(),
        {"Content-Type": "application/json"},
    )
    text, killed = "", False
    with urllib.request.urlopen(request, timeout=30) as response:
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            assert "error" not in event, event
            text += event["choices"][0]["text"]
            if not killed and len(text) > 5:
                killed = True
                os.kill(_busiest(cluster).pid, signal.SIGKILL)
    assert killed
    assert text == expected


def _busiest(cluster: LiveCluster) -> psutil.Process:
    """Return the node that computes: of the two, the one whose processor time grows."""
    nodes = [cluster.part("node-0"), cluster.part("node-1")]
    before = [sum(node.cpu_times()[:2]) for node in nodes]
    time.sleep(0.2)
    grown = [sum(node.cpu_times()[:2]) - then for node, then in zip(nodes, before, strict=True)]
    return nodes[grown.index(max(grown))]


def test_without_a_coordinator_requests_go_on_and_it_comes_back(cluster: LiveCluster) -> None:
    os.kill(cluster.part("coordinator").pid, signal.SIGKILL)
    for _ in range(5):
        assert cluster.chat("sort", "garden") == "adegnr"
