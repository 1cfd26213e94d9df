"""Two servers as an operator starts them: one pulls from the other what it lacks, and outlives it."""

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import openai
import pytest

from engine.demo.paths import adapter_folders

STOP_S = 60
TOKEN = "a token that is long enough".replace(" ", "-")


class Server:
    """A running server that shares adapters on loopback; `arguments` come on top."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        token = folder / "token"
        token.write_text(TOKEN)
        command = [sys.executable, "-m", "engine.serve", "--port", "0", "--no-progress", "--peer-plain"]
        command += ["--peer-token-file", str(token), "--peer-door", "stream", "--peer-listen", "127.0.0.1:0"]
        command += ["--kv-cache-bytes", "32MiB", "--adapter-bytes", "16MiB", *arguments]
        environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        self.url = self._told(r"ready at (http://\S+:\d+)")
        self.peer_address = self._told(r"peers may pull adapters at (\S+:\d+)")

    def ask(self, model: str, text: str = "planet") -> str | None:
        """The model's answer to one message."""
        with openai.OpenAI(base_url=f"{self.url}/v1", api_key="any", max_retries=0) as client:
            answer = client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": text}], temperature=0, max_tokens=16
            )
        return answer.choices[0].message.content

    def metric(self, name: str) -> float:
        """A sample of /metrics."""
        with urlopen(f"{self.url}/metrics") as answer:
            found = re.search(rf"^{re.escape(name)} (\S+)$", answer.read().decode(), re.MULTILINE)
        assert found, f"/metrics has no {name}"
        return float(found[1])

    def stop(self, number: signal.Signals) -> int:
        """Send a signal; the exit code."""
        self.process.send_signal(number)
        return self.process.wait(STOP_S)

    def _told(self, pattern: str) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(pattern, line)
        assert found, f"the server said {line!r}"
        return found[1]


@contextmanager
def serving(folder: Path, *arguments: str) -> Iterator[Server]:
    """A server until the block ends."""
    server = Server(folder, *arguments)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait(STOP_S)
        assert server.process.stdout is not None
        server.process.stdout.close()


@pytest.mark.slow
def test_a_second_server_pulls_what_it_lacks_and_outlives_the_first(tmp_path: Path) -> None:
    shutil.copytree(adapter_folders()["reverse"], tmp_path / "tenant")
    with (
        serving(tmp_path, "--lora", f"tenant={tmp_path / 'tenant'}") as first,
        serving(tmp_path, "--peer", first.peer_address) as second,
    ):
        with pytest.raises(openai.NotFoundError, match="ghost"):
            second.ask("ghost")
        assert second.ask("tenant") == "tenalp"
        assert second.metric("loraserve_peer_pulls_total") == 1
        assert second.metric('loraserve_adapter_hits_total{tier="peer"}') == 1
        first.stop(signal.SIGKILL)
        assert second.ask("tenant", "orbit") == "tibro"
        assert second.metric("loraserve_peer_pulls_total") == 1
        with pytest.raises(openai.InternalServerError, match="1 of 1 peers did not answer") as refusal:
            second.ask("other")
        assert refusal.value.status_code == 503
        assert second.ask("demo") == "planet"
        assert second.stop(signal.SIGTERM) == 0


def test_sharing_without_a_token_or_in_the_clear_is_refused_in_one_line(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN)
    base = [sys.executable, "-m", "engine.serve", "--port", "0", "--no-progress", "--peer-door", "stream"]
    with_token = ["--peer-token-file", str(token)]
    refusals = {
        ("--peer", "127.0.0.1:9", "--peer-plain"): "peer_token_file",
        ("--peer", "127.0.0.1:9", *with_token): "peer_tls_cert",
        ("--peer-listen", "0.0.0.0:0", "--peer-plain", *with_token): "peer_listen",
    }
    for arguments, field in refusals.items():
        ended = subprocess.run(
            [*base, *arguments], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"}, timeout=STOP_S
        )
        assert ended.returncode == 2
        assert ended.stderr.startswith(f"python -m engine.serve: {field}=")
        assert ended.stderr.count("\n") == 1
        assert TOKEN not in ended.stderr
