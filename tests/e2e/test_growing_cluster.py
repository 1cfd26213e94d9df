"""A cluster whose number of nodes follows the load: it grows while it refuses, then shrinks, and loses no request."""

import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.steady_clients import SteadyClients
from tests.e2e.test_cluster import free_port

READY_S, BOUND_S = 60.0, 180.0
CLIENTS, TOKENS = 16, 150  # a node has seats for two


class OpenCluster:
    """The launcher of one or two nodes, and its router's address."""

    def __init__(self, folder: Path) -> None:
        self.port, self.log = free_port(), folder / "log"
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "engine.serve", "--nodes", "1:2", "--port", str(self.port)),
                    *("--dtype", "float32", "--max-num-seqs", "2", "--slo-ttft-s", "3", "--slo-tbt-s", "5"),
                    *("--grow-after-s", "3", "--shrink-after-s", "4", "--drain-s", "20", "--no-progress"),
                ],
                stdout=file,
                stderr=file,
            )

    def ask(self, path: str, body: dict[str, object] | None = None) -> Any:
        """Return a response's JSON."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers)
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.loads(response.read())

    def complete(self) -> str:
        """Return a greedy text."""
        body: dict[str, object] = {
            "model": "reverse", "prompt": "garden", "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True,
        }  # fmt: skip
        return str(self.ask("/v1/completions", body)["choices"][0]["text"])

    def nodes(self) -> list[str]:
        """List the names of the nodes' processes."""
        names: list[str] = []
        for child in psutil.Process(self.process.pid).children():
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                line = child.cmdline()
                names += [line[line.index("--node-name") + 1]] if "--node-name" in line else []
        return sorted(name for name in names if name.startswith("node"))

    def until(self, holds: Callable[[], bool], bound_s: float = BOUND_S) -> None:
        """Wait until something is so."""
        deadline_s = time.monotonic() + bound_s
        while not holds():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline_s, self.log.read_text()
            time.sleep(0.2)

    def serves(self, nodes: int) -> bool:
        """Tell whether the router reaches so many nodes."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/metrics")
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return f"loraserve_cluster_nodes {float(nodes)}" in response.read().decode().splitlines()
        except (urllib.error.URLError, ConnectionError):
            return False


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[OpenCluster]:
    live = OpenCluster(tmp_path)
    try:
        live.until(lambda: live.serves(1), READY_S)
        live.until(lambda: len(live.ask("/v1/models")["data"]) > 8, READY_S)
        yield live
    finally:
        children = psutil.Process(live.process.pid).children()
        live.process.send_signal(signal.SIGTERM)
        assert live.process.wait(60) == 0
        assert not any(child.is_running() for child in children), "a process outlives the command"


@pytest.mark.slow
def test_load_brings_a_node_and_rest_takes_it_away_without_a_lost_request(cluster: OpenCluster) -> None:
    expected = cluster.complete()
    many = SteadyClients(cluster.complete, CLIENTS)
    try:
        cluster.until(lambda: cluster.serves(2))
        time.sleep(1.0)  # both serve
    finally:
        many.end()
    assert cluster.nodes() == ["node-0", "node-1"]
    assert many.refused > 0, "nothing else says that one node is too few"
    size = cluster.ask("/cluster")["size"]
    assert (size["wanted"], size["present"]) == (2, 2)
    one = SteadyClients(cluster.complete, 1, pause_s=0.5)
    try:
        cluster.until(lambda: cluster.nodes() == ["node-0"])
    finally:
        one.end()
    assert many.errors == one.errors == []
    assert set(many.texts) == set(one.texts) == {expected}
    assert one.refused == 0
    log = cluster.log.read_text()
    assert "2 nodes are wanted and 1 run:" in log
    assert "1 nodes are wanted and 2 run: one more was not needed for long enough" in log
    assert "node-1 has ended" in log
