"""Time from request to first token for an adapter in each tier: device, host, peer and disk, by rank.

    python -m scripts.bench_tiers --size 100m --rounds 3 --out results/bench_tiers.jsonl

A source server holds every adapter; this process asks it for what it lacks. Each adapter is asked for three
times: fresh (a peer's), again (resident), and once more after a large one has displaced it (kept packed, in host
memory or on disk). Which tier answered is read from the store's counters, not assumed. Disk means a file that the
system still has in its cache. A row per request is appended; a markdown table of medians comes last.
"""

import argparse
import json
import os
import re
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from engine.assembly import Engine, assemble
from engine.config import PEER_TOKEN_VARIABLE, EngineConfig, PeerConfig
from scheduler.request import Request, SamplingParams
from scripts.bench import machine
from scripts.make_bench_models import RANKS, SHAPES, Shape, make_adapter, make_base
from transport.base import Address

TIERS = ("device", "host", "peer", "disk")
PROMPT_TOKENS = 16
MOST_STEPS = 10_000
LARGEST = max(RANKS)


@dataclass(frozen=True, slots=True)
class Sample:
    """One request: what it asked for, which tier answered, and how long its first token took."""

    tier: str
    rank: int
    nbytes: int
    ttft_ms: float


def prepare(size: str, root: Path, rounds: int) -> Mapping[str, tuple[int, Path]]:
    """The base model in ROOT/SIZE, unless it is there, and `rounds` adapters of every rank: (rank, folder) by name."""
    shape: Shape = SHAPES[size]
    base = root / size
    if not (base / "model.safetensors").exists():
        make_base(shape, base, seed=0)
    named: dict[str, tuple[int, Path]] = {}
    wanted = [(f"r{rank}-{number}", rank) for number in range(rounds) for rank in RANKS]
    for seed, (name, rank) in enumerate([*wanted, ("wide-0", LARGEST), ("wide-1", LARGEST)]):
        folder = root / f"{size}-tiers" / name
        if not (folder / "adapter_config.json").exists():
            make_adapter(shape, rank, base, folder, seed)
        named[name] = rank, folder
    return named


@contextmanager
def source(base: Path, adapters: Mapping[str, tuple[int, Path]], sharing: PeerConfig) -> Iterator[Address]:
    """A server of its own that holds all adapters; where it lends them."""
    command = [sys.executable, "-m", "engine.serve", "--model", str(base), "--port", "0", "--no-progress"]
    command += ["--adapter-bytes", "8GiB", "--kv-cache-bytes", "64MiB", "--peer-listen", "127.0.0.1:0"]
    command += ["--peer-plain", "--peer-door", sharing.door, "--log-level", "warning"]
    for name, (_, folder) in adapters.items():
        command += ["--lora", f"{name}={folder}"]
    environment = os.environ | {PEER_TOKEN_VARIABLE: str(sharing.token)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    try:
        told = process.stdout.readline() + process.stdout.readline()
        found = re.search(r"pull adapters at ([\d.]+):(\d+)", told)
        if found is None:
            sys.exit(f"the source server did not start: {told!r}")
        yield Address(found[1], int(found[2]))
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()


def ask(engine: Engine, name: str, request_id: str) -> Sample:
    """Send one request through the step loop, up to its first token."""
    before = engine.store.stats().hits
    started_s = time.perf_counter()
    ref = engine.store.resolve(name)
    prompt = tuple(10 + secrets.randbelow(1000) for _ in range(PROMPT_TOKENS))
    params = SamplingParams(max_tokens=1, temperature=0.0, seed=0)
    engine.core.submit(Request(request_id, prompt, ref, params, (), time.monotonic()))
    for _ in range(MOST_STEPS):
        result = engine.core.step()
        if result.failures:
            sys.exit(f"{name}: {result.failures[0].error}")
        if result.events:
            break
        engine.wait_ready()
    ttft_ms = 1e3 * (time.perf_counter() - started_s)
    after = engine.store.stats().hits
    used = [tier for tier in after if tier != "device" and after[tier] > before[tier]]
    return Sample(used[0] if used else "device", ref.rank, ref.nbytes, ttft_ms)


def measure(engine: Engine, names: Sequence[str]) -> Iterator[Sample]:
    """Every adapter fresh, resident and displaced; the first two requests only warm up."""
    for name in ("wide-0", "wide-1"):
        ask(engine, name, f"warm-{name}")
    for number, name in enumerate(names):
        yield ask(engine, name, f"{name}-fresh")
        yield ask(engine, name, f"{name}-again")
        ask(engine, f"wide-{number % 2}", f"{name}-displaced-by")
        ask(engine, f"wide-{(number + 1) % 2}", f"{name}-displaced-by-too")
        yield ask(engine, name, f"{name}-displaced")


def table(samples: Sequence[Sample]) -> str:
    """Medians in milliseconds, a row per rank and a column per tier."""
    lines = ["| rank | MB | " + " | ".join(TIERS) + " |", "|" + "---:|" * (len(TIERS) + 2)]
    for rank in RANKS:
        mine = [sample for sample in samples if sample.rank == rank]
        cells = [[s.ttft_ms for s in mine if s.tier == tier] for tier in TIERS]
        told = " | ".join(f"{statistics.median(times):.1f}" if times else "-" for times in cells)
        lines.append(f"| {rank} | {mine[0].nbytes / 1e6:.1f} | {told} |")
    return "\n".join(lines)


def main() -> None:
    """Prepare, measure with and without a disk tier, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=sorted(SHAPES), default="100m")
    parser.add_argument("--rounds", type=int, default=3, help="adapters of each rank")
    parser.add_argument("--door", choices=("auto", "ucx", "stream"), default="stream")
    parser.add_argument("--folder", type=Path, default=Path("build/bench"), help="where models are made")
    parser.add_argument("--out", type=Path, default=Path("results/bench_tiers.jsonl"))
    options = parser.parse_args()
    adapters = prepare(options.size, options.folder, options.rounds)
    names = [name for name in adapters if not name.startswith("wide")]
    terms = PeerConfig(token=secrets.token_hex(16), plain=True, door=options.door)
    common = {"size": options.size, "door": options.door, "started": int(time.time()), **machine.describe()}
    samples: list[Sample] = []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with (
        TemporaryDirectory() as cache,
        source(options.folder / options.size, adapters, terms) as address,
        options.out.open("a") as file,
    ):
        for cache_dir in (None, Path(cache)):
            engine = engine_beside(address, options.folder / options.size, terms, cache_dir)
            for sample in measure(engine, names):
                samples.append(sample)
                file.write(json.dumps({**common, **asdict(sample)}) + "\n")
            close(engine)
    print(table(samples))


def engine_beside(address: Address, base: Path, terms: PeerConfig, cache_dir: Path | None) -> Engine:
    """An engine with room for little more than one adapter of the largest rank."""
    sharing = PeerConfig(peers=(address,), token=terms.token, plain=True, door=terms.door)
    shape = SHAPES[base.name]
    row_bytes = 4 * shape.layers * sum(sum(size) for size in shape.projections.values())
    return assemble(
        EngineConfig(
            model=str(base),
            adapter_bytes=int(1.05 * LARGEST * row_bytes),
            adapter_cache_dir=cache_dir,
            kv_cache_bytes=64 << 20,
            progress=False,
            sharing=sharing,
        )
    )


def close(engine: Engine) -> None:
    """Stop pulling and copying."""
    if engine.peers is not None:
        engine.peers.close()
    engine.store.close()


if __name__ == "__main__":
    main()
