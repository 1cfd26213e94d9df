"""Measure the time to first token for an adapter in each tier, by rank, beside the same request to the base model.

    python -m scripts.bench.tiers --size 100m --rounds 0 1 --out results/bench_tiers.jsonl

Tiers are the device, host memory, disk, and a peer, pulled by stream or through UCX. Servers are processes on
loopback, asked over HTTP. One holds every adapter and publishes them. Three others have room for little more
than one adapter of the largest rank. Of these one keeps evicted adapters in host memory and pulls by stream,
one keeps them on disk, and one pulls through UCX. Each adapter is asked for fresh (a peer's), again
(resident), and once more after large ones have evicted it. Which tier answered is read from the server's
metrics; disk means a file in the system's cache. A round asks once for an adapter of every rank, in random
order. Every sample is a row, with the request to the base model that came just before. Each run appends,
first what the machine moves at best; a table of medians comes last.
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
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

from engine.config.peer_config import PEER_TOKEN_VARIABLE
from scripts.arguments import one_line
from scripts.bench import machine
from scripts.bench.bandwidth import bandwidths
from scripts.bench.llama import RANKS, SHAPES, BenchAdapter, index_of, read_index
from scripts.results import append_rows

TIERS = ("device", "host", "disk", "ucx", "stream")
PROMPT_TOKENS = 16
LARGEST = max(RANKS)
HIT = re.compile(r'^loraserve_adapter_hits_total\{tier="(\w+)"\} (\S+)$', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class TierSample:
    """One request: which tier answered, and how long it and the base model took to their first tokens."""

    tier: str
    rank: int
    nbytes: int
    ttft_ms: float
    base_ms: float


@dataclass(frozen=True, slots=True)
class TierServer:
    """A running server; `data_path` is how it pulls."""

    port: int
    base: str
    data_path: str
    peer_address: str

    def first_token_ms(self, model: str) -> float:
        """Ask for one token after a prompt that nobody has asked before."""
        prompt = [10 + secrets.randbelow(1000) for _ in range(PROMPT_TOKENS)]
        body = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0, "ignore_eos": True}
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        began_s = time.perf_counter()
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
        took_s = time.perf_counter() - began_s
        connection.close()
        if answer.status != http.client.OK:
            sys.exit(f"{model}: {answer.status} {text.decode()}")
        return 1e3 * took_s

    def sample(self, adapter: BenchAdapter) -> TierSample:
        """Ask for the base model, then for an adapter."""
        base_ms = self.first_token_ms(self.base)
        before = self.hits()
        ttft_ms = self.first_token_ms(adapter.name)
        used = [tier for tier, hits in self.hits().items() if tier != "device" and hits > before[tier]]
        tier = used[0] if used else "device"
        nbytes = nbytes_of(self.base, adapter.rank)
        return TierSample(self.data_path if tier == "peer" else tier, adapter.rank, nbytes, ttft_ms, base_ms)

    def hits(self) -> Mapping[str, float]:
        """Read how often each tier supplied an adapter."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.request("GET", "/metrics")
        found = HIT.findall(connection.getresponse().read().decode())
        connection.close()
        return {tier: float(count) for tier, count in found}


@contextmanager
def serving(base: Path, token: str, data_path: str, *arguments: str) -> Generator[TierServer, None, None]:
    """Run a server of a base model until the block ends."""
    command = [sys.executable, "-m", "engine.serve", "--model", str(base), "--port", "0", "--no-progress"]
    command += [
        "--kv-cache-bytes",
        "64MiB",
        "--log-level",
        "warning",
        "--lora-dtype",
        "float32",
        "--peer-plain",
        "--peer-path",
        data_path,
    ]
    command += ["--peer-listen", "127.0.0.1:0", *arguments]
    environment = os.environ | {PEER_TOKEN_VARIABLE: token}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    try:
        said = process.stdout.readline() + process.stdout.readline()
        ready = re.search(r"ready at http://\S+:(\d+)", said)
        publishes = re.search(r"pull adapters at (\S+)", said)
        if ready is None or publishes is None:
            sys.exit(f"a server did not start: {said!r}")
        yield TierServer(int(ready[1]), base.name, data_path, publishes[1])
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()


def nbytes_of(size: str, rank: int) -> int:
    """Compute the bytes of an adapter in float32, as the servers keep it."""
    return 4 * rank * SHAPES[size].lora_weights_of_rank_one


def measure(
    servers: Mapping[str, TierServer], adapters: Sequence[BenchAdapter], wide: Sequence[BenchAdapter]
) -> Iterator[TierSample]:
    """Ask for every adapter in every tier; the `wide` ones evict what is resident."""
    for server in servers.values():
        for one in wide:
            server.first_token_ms(one.name)
    for one in adapters:
        for name in random.sample(sorted(servers), len(servers)):
            server = servers[name]
            yield server.sample(one)
            if name == "host":
                yield server.sample(one)
            for large in wide:
                server.first_token_ms(large.name)
            if name != "ucx":
                yield server.sample(one)


def table(samples: Sequence[TierSample]) -> str:
    """Write medians in milliseconds, a row per rank and a column per tier."""
    columns = ("base", *TIERS)
    lines = ["| rank | MB | " + " | ".join(columns) + " |", "|" + "---:|" * (len(columns) + 2)]
    for rank in RANKS:
        mine = [sample for sample in samples if sample.rank == rank]
        cells = [[s.base_ms for s in mine]]
        cells += [[s.ttft_ms for s in mine if s.tier == tier] for tier in TIERS]
        medians = " | ".join(f"{statistics.median(times):.1f}" if times else "-" for times in cells)
        lines.append(f"| {rank} | {mine[0].nbytes / 1e6:.1f} | {medians} |" if mine else f"| {rank} | - |")
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
    base = options.folder / options.size
    adapters = read_index(index_of(base))
    of_rank = {rank: [one for one in adapters if one.rank == rank] for rank in RANKS}
    wide = of_rank[LARGEST][-2:]
    numbers: list[int] = options.rounds
    rounds = [random.sample([of_rank[rank][number] for rank in RANKS], len(RANKS)) for number in numbers]
    chosen = [one for round_ in rounds for one in round_]
    if set(wide) & set(chosen):
        sys.exit(f"--rounds {max(numbers)}: the last two adapters of rank {LARGEST} evict the others")
    common = {"size": options.size, "started": int(time.time()), **machine.describe()}
    samples: list[TierSample] = []
    with open_servers(base, [*chosen, *wide]) as servers:
        paths = bandwidths(lambda view: sha256(view).digest())
        append_rows(
            options.out, ({**common, "path": path, "bytes_per_s": rate} for path, rate in paths.items())
        )
        for sample in measure(servers, chosen, wide):
            samples.append(sample)
            append_rows(options.out, [{**common, **asdict(sample)}])
    print(table(samples))


@contextmanager
def open_servers(
    base: Path, adapters: Sequence[BenchAdapter]
) -> Generator[Mapping[str, TierServer], None, None]:
    """Run one that publishes `adapters`, and the three that are measured."""
    token = secrets.token_hex(16)
    room = ("--adapter-bytes", str(int(1.05 * nbytes_of(base.name, LARGEST))))
    loras = [f"--lora={one.name}={one.path}" for one in adapters]
    with ExitStack() as stack:
        cache = stack.enter_context(TemporaryDirectory())
        held = ("--adapter-bytes", str(sum(2 * nbytes_of(base.name, one.rank) for one in adapters)))
        source = stack.enter_context(serving(base, token, "auto", *held, *loras))
        peer = ("--peer", source.peer_address)
        disk = ("--adapter-cache-dir", cache)
        yield {
            "host": stack.enter_context(serving(base, token, "stream", *peer, *room)),
            "disk": stack.enter_context(serving(base, token, "stream", *peer, *room, *disk)),
            "ucx": stack.enter_context(serving(base, token, "ucx", *peer, *room)),
        }


if __name__ == "__main__":
    with one_line("scripts.bench.tiers"):
        main()
