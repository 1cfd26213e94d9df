"""A server as an operator starts it, sharing adapters on loopback."""

import json
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import Request, urlopen

import openai

from engine.serve import main
from tests.forked_process import ForkedProcess

STOP_S = 60
TOKEN = "a token that is long enough".replace(" ", "-")


class Server:
    """A running server; `arguments` come on top."""

    def __init__(self, folder: Path, *arguments: str, listen: str = "127.0.0.1:0") -> None:
        token = folder / "token"
        token.write_text(TOKEN)
        options = ["--port", "0", "--no-progress", "--peer-plain", "--peer-token-file", str(token)]
        options += ["--peer-path", "stream", "--peer-listen", listen, "--kv-cache-bytes", "32MiB", *arguments]
        self.process = ForkedProcess(main, (options,), {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"})
        self.announced = ""  # the last line that was read of what the server says
        self.url = self._told(r"ready at (http://[^ ]+:\d+)")
        self.rpc_address = self.announced.partition(" and grpc://")[2].partition(": ")[0]
        self.peer_address = self._told(r"peers may pull adapters at (\S+:\d+)")

    def ask(self, model: str, text: str = "planet", *, stream: bool = False) -> str:
        """The model's answer to one message."""
        plain = openai.DefaultHttpxClient(verify=False)  # no authorities are read, as nothing is encrypted
        with openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="any", max_retries=0, http_client=plain
        ) as client:
            if stream:
                chunks = client.chat.completions.create(
                    model=model,
                    messages=[{"role": "user", "content": text}],
                    temperature=0,
                    max_tokens=16,
                    stream=True,
                )
                return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            answer = client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": text}], temperature=0, max_tokens=16
            )
        return answer.choices[0].message.content or ""

    def answers_within(self, seconds: float, expected: Callable[[], bool]) -> bool:
        """Ask again and again until it is as expected."""
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            if expected():
                return True
            time.sleep(0.05)
        return False

    def post(self, path: str, body: dict[str, str]) -> int:
        """POST JSON; the status."""
        request = Request(self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urlopen(request, timeout=STOP_S) as answer:
            return answer.status

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
        line = self.announced = self.process.stdout.readline()
        found = re.search(pattern, line)
        assert found, f"the server said {line!r}"
        return found[1]


@contextmanager
def serving(folder: Path, *arguments: str, listen: str = "127.0.0.1:0") -> Iterator[Server]:
    """A server until the block ends."""
    server = Server(folder, *arguments, listen=listen)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait(STOP_S)
        server.process.stdout.close()
