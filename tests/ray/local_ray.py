"""A Ray cluster of several raylets on this machine, and the launcher's command run against it."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from scripts.certificates import make_certificates
from tests.e2e.test_cluster import free_port

cluster_utils = pytest.importorskip("ray.cluster_utils", reason="ray is not installed (extra `ray`)")
TOKEN, KEY = "the-token-of-these-members", "the-key-of-these-clients"
BOUND_S = 120.0
_STORE_BYTES = 80 << 20  # the least that Ray takes
_ROOT = Path(__file__).parents[2]


class LocalRay:
    """A head without room for nodes, raylets to have nodes on, and the service's files."""

    def __init__(self, folder: Path, raylets: int, cpus: int) -> None:
        """Start Ray: so many raylets of so many processors each."""
        self.folder, self.port = folder, free_port()
        head: dict[str, Any] = {"num_cpus": 0, "include_dashboard": False}
        self._cluster = cluster_utils.Cluster(
            initialize_head=True, head_node_args=head | {"object_store_memory": _STORE_BYTES}
        )
        self.raylets = [
            self._cluster.add_node(num_cpus=cpus, object_store_memory=_STORE_BYTES) for _ in range(raylets)
        ]
        host = self._cluster.address.rpartition(":")[0]
        authority, certificate, key = make_certificates(folder / "trust", [host])
        (folder / "token").write_text(TOKEN)
        (folder / "keys").write_text(KEY)
        self.trust = [
            *("--peer-token-file", "token", "--peer-tls-ca", str(authority)),
            *("--peer-tls-cert", str(certificate), "--peer-tls-key", str(key), "--api-key-file", "keys"),
        ]
        self.small = [
            *("--port", str(self.port), "--dtype", "float32", "--drain-s", "20", "--no-progress"),
            *("--slo-ttft-s", "60", "--slo-tbt-s", "20", "--kv-cache-bytes", "32MiB"),
        ]

    def command(self, *arguments: str) -> list[str]:
        """Return a command line of the launcher."""
        at = ("--launcher", "ray", "--ray-address", self._cluster.address)
        return [sys.executable, "-m", "engine.serve", *at, *arguments]

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the launcher until it ends."""
        return subprocess.run(
            self.command(*arguments), capture_output=True, text=True, timeout=BOUND_S, cwd=self.folder,
            env=self._environment(),
        )  # fmt: skip

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start a service; return the launcher's process and leave its first line to be read."""
        return subprocess.Popen(
            self.command(*self.trust, *self.small, *arguments), stdout=subprocess.PIPE, text=True,
            cwd=self.folder, env=self._environment(),
        )  # fmt: skip

    def members(self) -> dict[str, list[str]]:
        """Return the status table's rows: machine, address and state by actor."""
        rows = [re.split(r"\s{2,}", line) for line in self.run("--status").stdout.splitlines()[1:]]
        return {row[1]: row[2:] for row in rows if len(row) >= 5}

    def until(self, *ready: str) -> dict[str, list[str]]:
        """Wait until exactly these nodes are ready; return all members."""
        deadline_s = time.monotonic() + BOUND_S
        while True:
            members = self.members()
            states = {name: row[2] for name, row in members.items() if name.startswith("node")}
            if states == dict.fromkeys(ready, "ready"):
                return members
            assert time.monotonic() < deadline_s, members

    def until_served(self, name: str) -> None:
        """Wait until the router knows an adapter."""
        deadline_s = time.monotonic() + BOUND_S
        while name not in [each["id"] for each in self.ask("/v1/models")["data"]]:
            assert time.monotonic() < deadline_s
            time.sleep(0.1)

    def ask(self, path: str, body: dict[str, object] | None = None) -> Any:
        """Return a response's JSON of the router."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers)
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.loads(response.read())

    def metrics(self) -> Sequence[str]:
        """Return the lines of the router's metrics."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/metrics", headers={"Authorization": f"Bearer {KEY}"}
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.read().decode().splitlines()

    def chat(self, model: str, text: str) -> str:
        """Return a greedy answer."""
        messages = [{"role": "user", "content": text}]
        body: dict[str, object] = {"model": model, "messages": messages, "temperature": 0}
        return str(self.ask("/v1/chat/completions", body)["choices"][0]["message"]["content"])

    def complete(self, model: str, tokens: int) -> str:
        """Return a greedy text of so many tokens."""
        body: dict[str, object] = {
            "model": model, "prompt": "garden", "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
        }  # fmt: skip
        return str(self.ask("/v1/completions", body)["choices"][0]["text"])

    def kill_raylet_of(self, name: str) -> int:
        """Kill the raylet that has a member, with no warning; return the member's process as it was."""
        process = self.process(name)
        for raylet in self.raylets:
            pids = {each.pid for each in self._descendants(raylet)}
            if process.pid in pids:
                self.raylets.remove(raylet)
                self._cluster.remove_node(raylet, allow_graceful=False)
                return process.pid
        raise AssertionError(f"{name} is on no raylet")

    def process(self, name: str) -> psutil.Process:
        """Find a member's process."""
        for process in self.processes():
            line = process.cmdline()
            if "--node-name" in line and line[line.index("--node-name") + 1] == name:
                return process
        raise AssertionError(f"{name} does not run")

    def processes(self) -> Sequence[psutil.Process]:
        """List the members' processes of this service, wherever they were started."""
        found: list[psutil.Process] = []
        for process in psutil.process_iter():
            try:
                if "engine.serve" in process.cmdline() and process.cwd() == str(self.folder):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
        return found

    def written(self) -> bytes:
        """Return all that Ray has written in its session's folder, sockets and shared memory apart."""
        session = Path(self._cluster.head_node.get_session_dir_path())
        return b"".join(path.read_bytes() for path in session.rglob("*") if path.is_file())

    def close(self) -> None:
        """End Ray."""
        self._cluster.shutdown()

    def _descendants(self, raylet: Any) -> Sequence[psutil.Process]:
        (info,) = raylet.all_processes["raylet"]
        return psutil.Process(info.process.pid).children(recursive=True)

    def _environment(self) -> dict[str, str]:
        return os.environ | {"PYTHONPATH": str(_ROOT)}
