"""The offline benchmark: tokens/s, time to first token and between tokens, beside the peers and the limit.

    python scripts/make_bench_models.py
    python scripts/bench_engine.py --models 100m,1b --batches 1,8,32 --kinds base,one,mixed

For each model the machine's read bandwidth and GEMM rate are measured first, then every kind of workload goes
round the engines: ours, a peer, the next peer, ours again in the next round. Rows are appended to a JSONL
file as they come; the last thing printed is a markdown table. Peers that are not installed are named and left
out.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.bench import limits, machine, measurement, workload
from scripts.bench.contender import (
    Contender,
    ContenderFailed,
    Job,
    LlamaCpp,
    Ours,
    Transformers,
    Vllm,
    execute,
)
from scripts.bench.measurement import Subject

PEERS = {"hf": Transformers, "vllm": Vllm, "llamacpp": LlamaCpp}
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Arena:
    """One model with its adapters, and what the machine could do with it."""

    model: Path
    adapters: tuple[workload.Adapter, ...]
    size: limits.ModelSize
    rates: limits.Rates

    @property
    def index(self) -> Path:
        """The adapters' index file."""
        return index_of(self.model)


def index_of(model: Path) -> Path:
    """Where a model's adapters are listed."""
    return model.with_name(f"{model.name}-adapters") / "index.json"


def enter(model: Path, dtype: str, quiet_s: float) -> Arena:
    """Read a model's sizes and measure the machine with them."""
    machine.wait_quiet(quiet_s)
    size = limits.read_size(model)
    rates = limits.measure(size, [dtype])
    print(
        f"# {model.name}: read {rates.read_bytes_per_s / 1e9:.1f} GB/s, "
        f"GEMM {rates.gemm_flops_per_s[dtype] / 1e9:.0f} GFLOP/s in {dtype}",
        flush=True,
    )
    return Arena(model, workload.read_index(index_of(model)), size, rates)


def present(contenders: Sequence[Contender]) -> list[Contender]:
    """Those that are installed; the others are named."""
    able: list[Contender] = []
    for contender in contenders:
        missing = [str(path) for path in contender.needs if not path.exists()]
        if missing:
            print(f"# {contender.name} is left out: {missing[0]} does not exist", flush=True)
        else:
            able.append(contender)
    return able


def compete(contender: Contender, job: Job, timeout_s: float) -> dict[str, measurement.Measurement]:
    """Run one contender; its measurements by workload, without those that it failed to make."""
    log = job.out / "log"
    try:
        for command in contender.commands(job):
            execute(command, log, timeout_s)
    except ContenderFailed as failure:
        print(f"# {contender.name} on {job.model.name}: {failure}", flush=True)
    return dict(measurement.read(path) for path in sorted(job.out.glob("*.json")))


@dataclass(frozen=True, slots=True)
class Contest:
    """One kind of workload on one model, done by one engine after the other. Answers are compared with those
    of the engine that came first."""

    arena: Arena
    works: tuple[workload.Workload, ...]
    job: Job
    timeout_s: float

    def rows(self, contenders: Sequence[Contender]) -> Iterator[dict[str, Any]]:
        """The rows of all engines, as they come."""
        answers: Mapping[str, measurement.Measurement] | None = None
        for contender in contenders:
            found = self.compete(contender)
            answers = answers or found
            for work in self.works:
                if work.name in found:
                    row = self.row(contender.name, work, found[work.name])
                    yield row | {"same_answers": compare(answers, found, work.name)}

    def compete(self, contender: Contender) -> dict[str, measurement.Measurement]:
        """One engine's measurements by workload, without those that it failed to make."""
        out = self.job.out / contender.name
        out.mkdir()
        try:
            for command in contender.commands(replace(self.job, out=out)):
                execute(command, out / "log", self.timeout_s)
        except ContenderFailed as failure:
            print(f"# {contender.name} on {self.job.model.name}: {failure}", flush=True)
        return dict(measurement.read(path) for path in sorted(out.glob("*.json")))

    def row(self, engine: str, work: workload.Workload, found: measurement.Measurement) -> dict[str, Any]:
        """One line of results."""
        arena, dtype = self.arena, self.job.dtype
        limit = limits.bound(arena.size, arena.rates, work, arena.adapters, dtype)
        subject = Subject(engine, arena.model.name, work, dtype)
        return measurement.to_row(subject, found, limit) | {"rates": asdict(arena.rates)}


def compare(
    first: Mapping[str, measurement.Measurement], found: Mapping[str, measurement.Measurement], name: str
) -> float | None:
    """Share of a workload's rows that two engines answered alike."""
    return measurement.same_answers(first[name].token_ids, found[name].token_ids) if name in first else None


def prepare(arena: Arena, kind: str, options: argparse.Namespace, folder: Path) -> Contest:
    """Write one kind's workloads of every batch size into a folder."""
    lengths = workload.Lengths(options.prompt_tokens, options.output_tokens)
    works = tuple(
        workload.make(kind, batch, arena.adapters, lengths, options.seed) for batch in options.batches
    )
    job = Job(
        model=arena.model,
        adapters=arena.index,
        workloads=tuple(workload.write(work, folder) for work in works),
        uses_adapters=any(row.adapter for work in works for row in work.rows),
        dtype=options.dtype,
        repeats=options.repeats,
        quiet_s=options.quiet_wait,
        out=folder,
    )
    return Contest(arena, works, job, options.timeout)


def contest(contenders: Sequence[Contender], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All rows of the benchmark: model by model, round by round, kind by kind, engine by engine."""
    for name in options.models:
        arena = enter(options.models_home / name, options.dtype, options.quiet_wait)
        for kind in options.kinds * options.rounds:
            with TemporaryDirectory() as folder:
                yield from prepare(arena, kind, options, Path(folder)).rows(contenders)


def names(text: str) -> list[str]:
    """A comma-separated list."""
    return text.split(",")


def numbers(text: str) -> list[int]:
    """A comma-separated list of whole numbers."""
    return [int(part) for part in text.split(",")]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", type=names, default=["100m", "1b"], help="folders below --models-home")
    add("--models-home", type=Path, default=ROOT / "build/bench")
    add("--kinds", type=names, default=["base", "one", "mixed"], help=f"of {', '.join(workload.KINDS)}")
    add("--batches", type=numbers, default=[1, 8, 32])
    add("--dtype", choices=limits.DTYPES, default="bf16")
    add("--prompt-tokens", type=int, default=128)
    add("--output-tokens", type=int, default=64)
    add("--peers", type=names, default=list(PEERS), help=f"of {', '.join(PEERS)}; or none")
    add("--peers-home", type=Path, default=ROOT / "build/peers", help="their environments")
    add("--peer-scripts", type=Path, default=ROOT.parent / "shared/bench", help="their harnesses")
    add("--rounds", type=int, default=1, help="how often to go round the engines")
    add("--repeats", type=int, default=3, help="runs of a workload in each round")
    add(
        "--quiet-wait",
        type=float,
        default=10,
        help="seconds to wait before a run for other processes to rest",
    )
    add("--timeout", type=float, default=900, help="seconds that an engine may take for one kind")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=ROOT / "results/bench_engine.jsonl")
    return parser.parse_args(arguments)


def summary(row: Mapping[str, Any]) -> str:
    """A row in one line, for whoever waits."""
    return (
        f"{row['engine']:18} {row['model']:5} {row['workload']:8} batch {row['batch']:2}: "
        f"{row['output_tok_s']:8.1f} tokens/s ({row['share_of_limit']:.0%} of the limit), "
        f"TTFT {row['ttft_ms']:.0f} ms, TBT {row['tbt_ms']:.1f} ms, others {row['others_cores']:.2f} cores"
    )


def main() -> int:
    """Run the benchmark; 1 if our own engine failed."""
    options = parse()
    peers = [
        PEERS[name](options.peer_scripts, options.peers_home) for name in options.peers if name != "none"
    ]
    contenders = [Ours(), *present(peers)]
    about = {"machine": machine.describe(), "started": time.strftime("%Y-%m-%dT%H:%M:%S")}
    rows: list[dict[str, Any]] = []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("a") as sink:
        for row in contest(contenders, options):
            rows.append(row | about)
            print(json.dumps(rows[-1]), file=sink, flush=True)
            print(summary(row), flush=True)
    print("\n" + measurement.tables(rows))
    expected = len(options.models) * options.rounds * len(options.kinds) * len(options.batches)
    return int(sum(row["engine"] == contenders[0].name for row in rows) < expected)


if __name__ == "__main__":
    sys.exit(main())
