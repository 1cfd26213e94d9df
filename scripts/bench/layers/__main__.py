"""Model whether a pulled adapter's first layers should be used before its last ones have come, from measured parts.

    python -m scripts.bench.layers --size 100m --out results/bench_layers.jsonl

Measured here: the first step of a request under a resident adapter, by rank and prompt length, and what this
machine moves and digests at best. A network of 10 Gbit/s stands beside these. From them follows the time to
the first token in three designs:

  now         pull all, digest all, then compute: a step never waits for an adapter
  overlapped  digest each layer while the next one is pulled, then compute; needs a digest per layer
  pipelined   begin to compute when the first layer has come; layer k waits for bytes and digest of layer k

Layers are of equal size, and the slowest stage of a pipeline decides. Pieces cost nothing here, which
flatters the latter two. In the last design the step, and so every other sequence in the batch, takes as long
as the bytes take to come: `stall_ms` is what each of them loses.
"""

import argparse
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from blake3 import blake3

from engine.assembly.assembly import Engine, assemble
from engine.config.config import EngineConfig
from scheduler.request import Request, SamplingParams
from scripts.arguments import count, one_line
from scripts.bench import machine
from scripts.bench.bandwidth import bandwidths
from scripts.bench.llama import RANKS, SHAPES, index_of, read_index
from scripts.results import Row, append_rows

PATHS = {"ucx": "process_vm_readv", "stream": "socket", "10 Gbit/s": "network"}
NETWORK_BYTES_PER_S = 1.25e9
PROMPTS_TOKENS = (16, 128)


@dataclass(frozen=True, slots=True)
class Designs:
    """Milliseconds to the first token in each design, and what other sequences lose in the last."""

    now_ms: float
    overlapped_ms: float
    pipelined_ms: float
    stall_ms: float


def designs(pull_s: float, digest_s: float, step_s: float, layers: int) -> Designs:
    """Compute three pipelines of `layers` equal pieces: none, of two stages, and of three."""
    overlapped_s = max(pull_s, digest_s) + min(pull_s, digest_s) / layers
    first_s = (pull_s + digest_s) / layers
    pieces_s = [time_s / layers for time_s in (pull_s, digest_s, step_s)]
    pipelined_s = sum(pieces_s) + (layers - 1) * max(pieces_s)
    stall_s = max(0.0, pipelined_s - first_s - step_s)
    return Designs(
        1e3 * (pull_s + digest_s + step_s), 1e3 * (overlapped_s + step_s), 1e3 * pipelined_s, 1e3 * stall_s
    )


def first_step_s(engine: Engine, name: str, prompt_tokens: int) -> float:
    """Time the step that computes a prompt, the adapter being resident."""
    params = SamplingParams(max_tokens=1, temperature=0.0, seed=0)
    prompt = tuple(10 + secrets.randbelow(1000) for _ in range(prompt_tokens))
    ref = engine.store.registry.resolve(name)
    engine.core.submit(Request(secrets.token_hex(8), prompt, ref, params, (), time.monotonic()))
    while True:
        began_s = time.perf_counter()
        result = engine.core.step()
        took_s = time.perf_counter() - began_s
        if result.events:
            return took_s
        if result.idle:
            engine.wait_ready()


def measure(engine: Engine, names: Mapping[int, str], rounds: int) -> Iterator[tuple[int, int, float]]:
    """Yield (rank, prompt's tokens, seconds of its step): the best of some interleaved ones, like the rates."""
    times: dict[tuple[int, int], list[float]] = {}
    for _ in range(rounds + 1):
        for rank, name in names.items():
            for prompt_tokens in PROMPTS_TOKENS:
                times.setdefault((rank, prompt_tokens), []).append(first_step_s(engine, name, prompt_tokens))
    for (rank, prompt_tokens), took_s in times.items():
        yield rank, prompt_tokens, min(took_s[1:])


def rows(size: str, engine: Engine, names: Mapping[int, str], rounds: int) -> Iterator[Row]:
    """Yield a row per rank, prompt and path."""
    rates = {"network": NETWORK_BYTES_PER_S, **bandwidths(lambda view: blake3(view).digest())}
    store, layers = engine.store, SHAPES[size].layers
    for rank, prompt_tokens, step_s in measure(engine, names, rounds):
        nbytes = store.registry.resolve(names[rank]).nbytes
        for path, rate in PATHS.items():
            pull_s, digest_s = nbytes / rates[rate], nbytes / rates["digest"]
            parts = {"pull_ms": 1e3 * pull_s, "digest_ms": 1e3 * digest_s, "step_ms": 1e3 * step_s}
            where = {"path": path, "rank": rank, "nbytes": nbytes, "prompt_tokens": prompt_tokens}
            yield where | parts | asdict(designs(pull_s, digest_s, step_s, layers))


def table(found: Sequence[Row]) -> str:
    """Write a line per row."""
    columns = ("path", "rank", "prompt_tokens", "pull_ms", "digest_ms", "step_ms")
    columns += ("now_ms", "overlapped_ms", "pipelined_ms", "stall_ms")
    lines = ["| " + " | ".join(columns) + " |", "|" + "---:|" * len(columns)]
    for row in found:
        cells = [row[column] for column in columns]
        texts = [f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in cells]
        lines.append("| " + " | ".join(texts) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, work it out, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=sorted(SHAPES), default="100m")
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument("--rounds", type=count, default=5)
    parser.add_argument("--folder", type=Path, default=Path("build/bench"), help="where the models are")
    parser.add_argument("--out", type=Path, default=Path("results/bench_layers.jsonl"))
    options = parser.parse_args()
    base: Path = options.folder / options.size
    adapters = {one.rank: one for one in reversed(read_index(index_of(base)))}
    ranks: list[int] = options.ranks
    if missing := set(ranks) - set(adapters):
        parser.error(f"--ranks {min(missing)}: give some of {', '.join(map(str, sorted(adapters)))}")
    chosen = {rank: adapters[rank] for rank in ranks}
    rank_row = SHAPES[options.size].lora_weights_of_rank_one
    engine = assemble(
        EngineConfig(
            model=str(base),
            loras={one.name: one.path for one in chosen.values()},
            adapter_bytes=sum(4 * rank * rank_row + (4 << 20) for rank in chosen),
            kv_cache_bytes=256 << 20,
            progress=False,
        )
    )
    names = {rank: one.name for rank, one in chosen.items()}
    common = {"size": options.size, "started": int(time.time()), **machine.describe()}
    found = list(rows(options.size, engine, names, options.rounds))
    engine.store.close()
    append_rows(options.out, ({**common, **row} for row in found))
    print(table(found))


if __name__ == "__main__":
    with one_line("scripts.bench.layers"):
        main()
