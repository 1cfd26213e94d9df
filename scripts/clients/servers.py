"""Start what clients are tried against: one server, or a cluster that they meet by its router."""

import asyncio
import json
import re
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.error import URLError
from urllib.request import Request, urlopen

from scripts.bench.serving.server import ServerFailed, launched

KEY = "a-key-of-the-clients"
_OPTIONS = (
    *("--no-progress", "--kv-cache-bytes", "64MiB", "--adapter-bytes", "32MiB"),
    *("--api-key", KEY, "--grpc-port", "0"),
)
_ADDRESSES = rb"ready at (https?://[^\s/]+:\d+) and grpc://([^\s/]+:\d+)"
_ONE, _ROUTER = re.compile(rb"^" + _ADDRESSES), re.compile(rb"^router " + _ADDRESSES)
_START_S, _STOP_S, _POLL_S = 600.0, 180.0, 1.0
"""A cluster that were killed would leave its processes behind, so it has long to end."""


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """Where clients find it: the URL without a path, and HOST:PORT for gRPC."""

    url: str
    rpc: str


@asynccontextmanager
async def server_for_clients(nodes: int, root: Path) -> AsyncGenerator[ServerAddress, None]:
    """Run a cluster of so many nodes, or one server for 0, until the block ends. Raises ServerFailed."""
    cluster = ("--nodes", str(nodes), "--drain-s", "5") if nodes else ()
    pattern = _ROUTER if nodes else _ONE
    with TemporaryDirectory() as folder:
        options = (*_OPTIONS, *cluster, "--batch-dir", folder)
        async with launched(options, root, _START_S, pattern, _STOP_S) as ready:
            address = ServerAddress(ready[1].decode(), ready[2].decode())
            await asyncio.to_thread(wait_for_answer, address.url, _START_S)
            yield address


def wait_for_answer(url: str, timeout_s: float) -> None:
    """Wait until an adapter answers: a router listens before its nodes have joined. Raises ServerFailed."""
    body = json.dumps({"model": "reverse", "prompt": "a", "max_tokens": 1}).encode()
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    deadline_s, reason = time.monotonic() + timeout_s, ""
    while time.monotonic() < deadline_s:
        try:
            urlopen(Request(f"{url}/v1/completions", body, headers), timeout=60).close()
        except (URLError, TimeoutError) as error:
            reason = str(error)
            time.sleep(_POLL_S)
        else:
            return
    raise ServerFailed(f"no adapter was answered after {timeout_s:.0f} s: {reason}")
