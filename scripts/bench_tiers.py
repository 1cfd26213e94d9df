"""Time from request to first token for an adapter in each tier (device, host, disk, and a peer's by each door), by
rank, beside the same request to the base model.

    python -m scripts.bench_tiers --size 100m --rounds 0 1 --out results/bench_tiers.jsonl

Servers are processes on loopback, asked over HTTP. One holds every adapter and lends them. Three others have room for
little more than one adapter of the largest rank: one keeps displaced ones in host memory and pulls by stream, one keeps
them on disk, one pulls through UCX. Each adapter is asked for fresh (a peer's), again (resident), and once more after
large ones have displaced it. Which tier answered is read from the server's metrics, not assumed; disk means a file that
the system still has in its cache. A round asks once for an adapter of every rank, in random order; every sample is
written as a row with the request to the base model that came just before. Each run appends, first what the machine
moves at best; a table of medians comes last.
"""

import argparse
import http.client
import json
import os
import random
import re
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

from engine.config.peer_config import PEER_TOKEN_VARIABLE
from scripts.bench import machine
from scripts.bench.bandwidth import bandwidths
from scripts.make_bench_models import RANKS, SHAPES

TIERS = ("device", "host", "disk", "ucx", "stream")
PROMPT_TOKENS = 16
LARGEST = max(RANKS)
HIT = re.compile(r'^loraserve_adapter_hits_total\{tier="(\w+)"\} (\S+)$', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Sample:
    """One request: which tier answered, and how long it and the base model took to their first tokens."""

    tier: str
    rank: int
    nbytes: int
    ttft_ms: float
    base_ms: float


@dataclass(frozen=True, slots=True)
class Server:
    """A running server; `door` is how it pulls."""

    port: int
    base: str
    door: str
    peer_address: str

    def first_token_ms(self, model: str) -> float:
        """Ask for one token after a prompt that nobody has asked before."""
        prompt = [10 + secrets.randbelow(1000) for _ in range(PROMPT_TOKENS)]
        body = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0, "ignore_eos": True}
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        began_s = time.perf_counter()
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        told = answer.read()
        took_s = time.perf_counter() - began_s
        connection.close()
        if answer.status != http.client.OK:
            sys.exit(f"{model}: {answer.status} {told.decode()}")
        return 1e3 * took_s

    def sample(self, model: str, rank: int, nbytes: int) -> Sample:
        """Ask for the base model, then for an adapter."""
        base_ms = self.first_token_ms(self.base)
        before = self.hits()
        ttft_ms = self.first_token_ms(model)
        used = [tier for tier, hits in self.hits().items() if tier != "device" and hits > before[tier]]
        tier = used[0] if used else "device"
        return Sample(self.door if tier == "peer" else tier, rank, nbytes, ttft_ms, base_ms)

    def hits(self) -> Mapping[str, float]:
        """How often each tier was good for something."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.request("GET", "/metrics")
        found = HIT.findall(connection.getresponse().read().decode())
        connection.close()
        return {tier: float(count) for tier, count in found}


@contextmanager
def serving(base: Path, token: str, door: str, *arguments: str) -> Iterator[Server]:
    """A server of BASE until the block ends."""
    command = [sys.executable, "-m", "engine.serve", "--model", str(base), "--port", "0", "--no-progress"]
    command += ["--kv-cache-bytes", "64MiB", "--log-level", "warning", "--peer-plain", "--peer-path", door]
    command += ["--peer-listen", "127.0.0.1:0", *arguments]
    environment = os.environ | {PEER_TOKEN_VARIABLE: token}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    try:
        told = process.stdout.readline() + process.stdout.readline()
        ready = re.search(r"ready at http://\S+:(\d+)", told)
        lends = re.search(r"pull adapters at (\S+)", told)
        if ready is None or lends is None:
            sys.exit(f"a server did not start: {told!r}")
        yield Server(int(ready[1]), base.name, door, lends[1])
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()


@dataclass(frozen=True, slots=True)
class Adapter:
    """One of the adapters of scripts.make_bench_models."""

    name: str
    rank: int
    folder: Path
    nbytes: int


def read_adapters(size: str, root: Path) -> list[Adapter]:
    """All adapters of ROOT/SIZE-adapters; nbytes in float32, as they are kept on a CPU."""
    index = json.loads((root / f"{size}-adapters" / "index.json").read_text())
    row_bytes = row_bytes_of(size)
    return [Adapter(one["name"], one["rank"], Path(one["path"]), one["rank"] * row_bytes) for one in index]


def row_bytes_of(size: str) -> int:
    """Bytes of one rank row on all sites of all layers."""
    shape = SHAPES[size]
    return 4 * shape.layers * sum(sum(sizes) for sizes in shape.projections.values())


def measure(
    servers: Mapping[str, Server], adapters: Sequence[Adapter], wide: Sequence[Adapter]
) -> Iterator[Sample]:
    """Every adapter by every tier; the `wide` ones displace what is resident."""
    for server in servers.values():
        for one in wide:
            server.first_token_ms(one.name)
    for one in adapters:
        for name in random.sample(sorted(servers), len(servers)):
            server = servers[name]
            yield server.sample(one.name, one.rank, one.nbytes)
            if name == "host":
                yield server.sample(one.name, one.rank, one.nbytes)
            for large in wide:
                server.first_token_ms(large.name)
            if name != "ucx":
                yield server.sample(one.name, one.rank, one.nbytes)


def table(samples: Sequence[Sample]) -> str:
    """Medians in milliseconds, a row per rank and a column per tier."""
    columns = ("base", *TIERS)
    lines = ["| rank | MB | " + " | ".join(columns) + " |", "|" + "---:|" * (len(columns) + 2)]
    for rank in RANKS:
        mine = [sample for sample in samples if sample.rank == rank]
        cells = [[s.base_ms for s in mine]]
        cells += [[s.ttft_ms for s in mine if s.tier == tier] for tier in TIERS]
        told = " | ".join(f"{statistics.median(times):.1f}" if times else "-" for times in cells)
        lines.append(f"| {rank} | {mine[0].nbytes / 1e6:.1f} | {told} |" if mine else f"| {rank} | - |")
    return "\n".join(lines)


def main() -> None:
    """Start the servers, measure, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=sorted(SHAPES), default="100m")
    parser.add_argument("--rounds", type=int, nargs="+", default=[0, 1], help="which adapters of each rank")
    parser.add_argument("--folder", type=Path, default=Path("build/bench"), help="where the models are")
    parser.add_argument("--out", type=Path, default=Path("results/bench_tiers.jsonl"))
    options = parser.parse_args()
    adapters = read_adapters(options.size, options.folder)
    of_rank = {rank: [one for one in adapters if one.rank == rank] for rank in RANKS}
    wide = of_rank[LARGEST][-2:]
    rounds = [
        random.sample([of_rank[rank][number] for rank in RANKS], len(RANKS)) for number in options.rounds
    ]
    chosen = [one for round_ in rounds for one in round_]
    if set(wide) & set(chosen):
        sys.exit(
            f"--rounds {max(options.rounds)}: the last two adapters of rank {LARGEST} displace the others"
        )
    common = {"size": options.size, "started": int(time.time()), **machine.describe()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    samples: list[Sample] = []
    with (
        open_servers(options.folder / options.size, [*chosen, *wide]) as servers,
        options.out.open("a") as file,
    ):
        for path, rate in bandwidths(lambda view: sha256(view).digest()).items():
            file.write(json.dumps({**common, "path": path, "bytes_per_s": rate}) + "\n")
        for sample in measure(servers, chosen, wide):
            samples.append(sample)
            file.write(json.dumps({**common, **asdict(sample)}) + "\n")
            file.flush()
    print(table(samples))


@contextmanager
def open_servers(base: Path, adapters: Sequence[Adapter]) -> Iterator[Mapping[str, Server]]:
    """One that lends `adapters`, and the three that are measured."""
    token = secrets.token_hex(16)
    room = ("--adapter-bytes", str(int(1.05 * LARGEST * row_bytes_of(base.name))))
    loras = [f"--lora={one.name}={one.folder}" for one in adapters]
    with ExitStack() as stack:
        cache = stack.enter_context(TemporaryDirectory())
        source = stack.enter_context(
            serving(base, token, "auto", "--adapter-bytes", str(sum(2 * a.nbytes for a in adapters)), *loras)
        )
        peer = ("--peer", source.peer_address)
        disk = ("--adapter-cache-dir", cache)
        yield {
            "host": stack.enter_context(serving(base, token, "stream", *peer, *room)),
            "disk": stack.enter_context(serving(base, token, "stream", *peer, *room, *disk)),
            "ucx": stack.enter_context(serving(base, token, "ucx", *peer, *room)),
        }


if __name__ == "__main__":
    main()
