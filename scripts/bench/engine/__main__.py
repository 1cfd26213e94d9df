"""Measure offline speed: tokens/s, time to first token and between tokens, beside other engines and the limit.

    python -m scripts.bench.make_models
    python -m scripts.bench.engine --models 100m,1b --batches 1,8,32 --kinds base,one,mixed

For each model the machine's read bandwidth and GEMM rate are measured first. Then every kind of workload is
run by one engine after another: loraserve, a baseline, the next baseline, loraserve again in the next round.
Rows are appended to a JSONL file as they come; the last thing printed is a markdown table. Baselines that are
not installed are named and left out.
"""

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from scripts.arguments import count, counts, one_line, seconds, some_of
from scripts.bench import machine
from scripts.bench.engine import limits, measurement, workload
from scripts.bench.engine.baselines import (
    ROOT,
    ComparedEngine,
    EngineFailed,
    LlamaCpp,
    Loraserve,
    OfflineJob,
    Transformers,
    Vllm,
    execute,
)
from scripts.bench.engine.measurement import EngineMeasurement, MeasuredEngine
from scripts.bench.llama import BenchAdapter, LlamaShape, index_of, read_index, read_shape
from scripts.results import Row, append_rows

BASELINES = {"hf": Transformers, "vllm": Vllm, "llamacpp": LlamaCpp}


@dataclass(frozen=True, slots=True)
class ModelUnderTest:
    """One model with its adapters, and what the machine could do with it."""

    folder: Path
    adapters: tuple[BenchAdapter, ...]
    shape: LlamaShape
    rates: limits.Rates


def measure_limits(model: Path, dtype: str, quiet_s: float) -> ModelUnderTest:
    """Read a model's sizes and measure the machine with them."""
    machine.wait_quiet(quiet_s)
    shape = read_shape(model)
    rates = limits.measure(shape, [dtype])
    print(
        f"# {model.name}: read {rates.read_bytes_per_s / 1e9:.1f} GB/s, "
        f"GEMM {rates.gemm_flops_per_s[dtype] / 1e9:.0f} GFLOP/s in {dtype}",
        flush=True,
    )
    return ModelUnderTest(model, read_index(index_of(model)), shape, rates)


def installed(engines: Sequence[ComparedEngine]) -> list[ComparedEngine]:
    """Select the engines that are installed, and name the others."""
    able: list[ComparedEngine] = []
    for engine in engines:
        missing = [str(path) for path in engine.needs if not path.exists()]
        if missing:
            print(f"# {engine.name} is left out: {missing[0]} does not exist", flush=True)
        else:
            able.append(engine)
    return able


@dataclass(frozen=True, slots=True)
class Comparison:
    """One kind of workload on one model, run by one engine after another.

    Answers are compared with those of the engine that came first.
    """

    model: ModelUnderTest
    works: tuple[workload.OfflineWorkload, ...]
    job: OfflineJob
    timeout_s: float

    def rows(self, engines: Sequence[ComparedEngine]) -> Iterator[Row]:
        """Yield the rows of all engines as they come."""
        answers: Mapping[str, EngineMeasurement] | None = None
        for engine in engines:
            found = self.measure(engine)
            answers = answers or found
            for work in self.works:
                if work.name in found:
                    row = self.row(engine.name, work, found[work.name])
                    yield {**row, "same_answers": compare(answers, found, work.name)}

    def measure(self, engine: ComparedEngine) -> dict[str, EngineMeasurement]:
        """Run one engine; its measurements by workload, without those that it failed to make."""
        out = self.job.out / engine.name
        out.mkdir()
        try:
            for command in engine.commands(replace(self.job, out=out)):
                execute(command, out / "log", self.timeout_s)
        except EngineFailed as failure:
            print(f"# {engine.name} on {self.job.model.name}: {failure}", flush=True)
        return dict(measurement.read(path) for path in sorted(out.glob("*.json")))

    def row(self, engine: str, work: workload.OfflineWorkload, found: EngineMeasurement) -> Row:
        """Make one line of results."""
        model, dtype = self.model, self.job.dtype
        limit = limits.bound(model.shape, model.rates, work, model.adapters, dtype)
        measured = MeasuredEngine(engine, model.folder.name, work, dtype)
        return measurement.to_row(measured, found, limit) | {"rates": asdict(model.rates)}


def compare(
    first: Mapping[str, EngineMeasurement], found: Mapping[str, EngineMeasurement], name: str
) -> float | None:
    """Compute the share of a workload's requests that two engines answered alike."""
    return measurement.same_answers(first[name].token_ids, found[name].token_ids) if name in first else None


def prepare(model: ModelUnderTest, kind: str, options: argparse.Namespace, folder: Path) -> Comparison:
    """Write one kind's workloads of every batch size into a folder."""
    lengths = workload.OfflineLengths(options.prompt_tokens, options.output_tokens)
    works = tuple(
        workload.make(kind, batch, model.adapters, lengths, options.seed) for batch in options.batches
    )
    job = OfflineJob(
        model=model.folder,
        adapters=index_of(model.folder),
        workloads=tuple(workload.write(work, folder) for work in works),
        uses_adapters=any(request.adapter for work in works for request in work.requests),
        dtype=options.dtype,
        repeats=options.repeats,
        quiet_s=options.quiet_wait,
        out=folder,
    )
    return Comparison(model, works, job, options.timeout)


def compare_all(engines: Sequence[ComparedEngine], options: argparse.Namespace) -> Iterator[Row]:
    """Yield all rows of the benchmark: model by model, round by round, kind by kind, engine by engine."""
    for name in options.models:
        model = measure_limits(options.models_home / name, options.dtype, options.quiet_wait)
        for kind in options.kinds * options.rounds:
            with TemporaryDirectory() as folder:
                yield from prepare(model, kind, options, Path(folder)).rows(engines)


def names(text: str) -> list[str]:
    """Split a comma-separated list."""
    return text.split(",")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", type=names, default=["100m", "1b"], help="folders below --models-home")
    add("--models-home", type=Path, default=ROOT / "build/bench")
    add(
        "--kinds",
        type=some_of(workload.KINDS),
        default=["base", "one", "mixed"],
        help=f"of {', '.join(workload.KINDS)}",
    )
    add("--batches", type=counts, default=[1, 8, 32])
    add("--dtype", choices=limits.DTYPES, default="bf16")
    add("--prompt-tokens", type=count, default=128)
    add("--output-tokens", type=count, default=64)
    add(
        "--baselines",
        type=some_of((*BASELINES, "none")),
        default=list(BASELINES),
        help=f"of {', '.join(BASELINES)}; or none",
    )
    add("--baselines-home", type=Path, default=ROOT / "build/baselines", help="their environments")
    add("--harnesses", type=Path, default=ROOT / "build/baselines/harnesses", help="their harnesses")
    add("--rounds", type=count, default=1, help="how often every engine runs")
    add("--repeats", type=count, default=3, help="runs of a workload in each round")
    add(
        "--quiet-wait",
        type=seconds,
        default=10,
        help="seconds to wait before a run for other processes to rest",
    )
    add("--timeout", type=seconds, default=900, help="seconds that an engine may take for one kind")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=ROOT / "results/bench_engine.jsonl")
    return parser.parse_args(arguments)


def summary(row: Row) -> str:
    """Write a row in one line, for whoever waits."""
    return (
        f"{row['engine']:18} {row['model']:5} {row['workload']:8} batch {row['batch']:2}: "
        f"{row['output_tok_s']:8.1f} tokens/s ({row['share_of_limit']:.0%} of the limit), "
        f"TTFT {row['ttft_ms']:.0f} ms, TBT {row['tbt_ms']:.1f} ms, others {row['others_cores']:.2f} cores"
    )


def main() -> int:
    """Run the benchmark; 1 if loraserve failed."""
    options = parse()
    baselines = [
        BASELINES[name](options.harnesses, options.baselines_home)
        for name in options.baselines
        if name != "none"
    ]
    engines = [Loraserve(), *installed(baselines)]
    about = {"machine": machine.describe(), "started": time.strftime("%Y-%m-%dT%H:%M:%S")}
    rows: list[Row] = []
    for row in compare_all(engines, options):
        rows.append({**row, **about})
        append_rows(options.out, rows[-1:])
        print(summary(row), flush=True)
    print("\n" + measurement.tables(rows))
    expected = len(options.models) * options.rounds * len(options.kinds) * len(options.batches)
    return int(sum(row["engine"] == engines[0].name for row in rows) < expected)


if __name__ == "__main__":
    with one_line("scripts.bench.engine"):
        raise SystemExit(main())
