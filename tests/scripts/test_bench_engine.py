"""The offline benchmark's arithmetic, its files, and its way from engine to engine, without any real one."""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from engine import Output, Result, SamplingParams
from scheduler.plan import FinishReason
from scripts.bench.engine import __main__ as bench_engine
from scripts.bench.engine import harness, limits, measurement, workload
from scripts.bench.engine.baselines import EngineFailed, Loraserve, OfflineJob, Transformers, execute
from scripts.bench.engine.limits import Limit, Rates
from scripts.bench.engine.measurement import EngineMeasurement, MeasuredEngine, OfflineRun
from scripts.bench.engine.workload import OfflineLengths
from scripts.bench.llama import SHAPES, BenchAdapter, LlamaShape

ADAPTERS = tuple(BenchAdapter(f"a{number}", f"/a{number}", rank) for number, rank in enumerate((8, 16, 128)))
SHORT = OfflineLengths(prompt_tokens=20, output_tokens=4, vocabulary=500)


def test_kinds_differ_in_adapters_and_in_nothing_else() -> None:
    works = {kind: workload.make(kind, 8, ADAPTERS, SHORT) for kind in workload.KINDS}
    names = {kind: [one.adapter for one in work.requests] for kind, work in works.items()}
    assert len({tuple(one.prompt_token_ids for one in work.requests) for work in works.values()}) == 1
    assert names["base"] == [None] * 8
    assert names["one"] == ["a1"] * 8
    assert names["r128"] == ["a2"] * 8
    assert names["mixed"] == ["a0", "a1", "a2", "a0", "a1", "a2", "a0", "a1"]
    assert names["mixbase"] == ["a0", "a1", "a2", None, "a1", "a2", "a0", None]


def test_batches_share_no_prompt() -> None:
    small, large = (workload.make("base", batch, ADAPTERS, SHORT) for batch in (2, 8))
    assert not {one.prompt_token_ids for one in small.requests} & {
        one.prompt_token_ids for one in large.requests
    }


def test_a_workload_survives_its_file(tmp_path: Path) -> None:
    work = workload.make("mixbase", 4, ADAPTERS, SHORT)
    assert workload.read(workload.write(work, tmp_path)) == work


def test_a_rank_that_no_adapter_has_is_named() -> None:
    with pytest.raises(ValueError, match="rank=8"):
        workload.make("r8", 1, ADAPTERS[1:], SHORT)


def test_freshened_prompts_share_no_first_token_and_all_else() -> None:
    rows = workload.make("mixed", 3, ADAPTERS, SHORT).requests
    assert workload.freshen(rows, 0) == rows
    for index, row in enumerate(rows):
        versions = [workload.freshen(rows, salt)[index] for salt in (-1, 0, 1, 2)]
        assert len({version.prompt_token_ids[0] for version in versions}) == 4
        assert {version.prompt_token_ids[1:] for version in versions} == {row.prompt_token_ids[1:]}


@pytest.mark.parametrize("name", SHAPES)
def test_the_limit_counts_the_weights_that_the_models_have(name: str) -> None:
    shape = SHAPES[name]
    linears = {
        key: math.prod(sizes) for key, sizes in shape.weights() if "norm" not in key and "embed" not in key
    }
    assert shape.body_weights + shape.head_weights == sum(linears.values())
    assert 8 * shape.lora_weights_of_rank_one == sum(math.prod(sizes) for _, sizes in shape.lora_weights(8))


def test_the_limit_of_a_workload_is_the_roofline() -> None:
    shape = LlamaShape(hidden=4, layers=1, heads=1, kv_heads=1, head=4, intermediate=4, vocabulary=10)
    body, head, per_rank = (3 * 4 + 4 + 2 * 4 + 4) * 4, 40, 7 * 8
    work = workload.make("mixed", 4, ADAPTERS, SHORT)  # ranks 8, 16, 128, 8: the last is the first again
    slow_memory = Rates(read_bytes_per_s=1.0, gemm_flops_per_s={"bf16": math.inf})
    read_s = 2.0 * (body + head + per_rank * (8 + 16 + 128))
    kv_s = 4 * (20 + 4 / 2) * 2 * 4 * 2
    found = limits.bound(shape, slow_memory, work, ADAPTERS, "bf16")
    assert found.tbt_ms == pytest.approx(1e3 * (read_s + kv_s))
    assert found.output_tok_s == pytest.approx(16 / (read_s + 3 * (read_s + kv_s)))
    slow_cores = Rates(read_bytes_per_s=math.inf, gemm_flops_per_s={"bf16": 1.0})
    flops = 2.0 * (4 * body + per_rank * (8 + 16 + 128 + 8))
    found = limits.bound(shape, slow_cores, work, ADAPTERS, "bf16")
    assert found.tbt_ms == pytest.approx(1e3 * (flops + 2 * 4 * head))
    assert found.ttft_ms == pytest.approx(1e3 * (20 * flops + 2 * 4 * head) * 5 / 8)


def test_medians_are_of_the_quiet_runs_if_there_are_any() -> None:
    noisy, quiet, quieter = (
        OfflineRun(10, 100, 9, 1.5),
        OfflineRun(30, 50, 3, 0.1),
        OfflineRun(40, 70, 4, 0.0),
    )
    assert EngineMeasurement((noisy, quiet, quieter), (), {}).median() == OfflineRun(35, 60, 3.5, 0.05)
    assert EngineMeasurement((noisy,), (), {}).median() == noisy


def test_same_answers_is_a_share_unless_ids_are_missing() -> None:
    assert measurement.same_answers(((1, 2), (3, 4)), ((1, 2), (3, 5))) == 0.5
    assert measurement.same_answers(((1, 2), (3, 4)), ((1, 2), (3, -1))) is None


def test_rows_say_which_share_of_the_limit_was_reached_and_tables_keep_the_last() -> None:
    work = workload.make("base", 1, ADAPTERS, SHORT)
    limit = Limit(output_tok_s=200.0, ttft_ms=1.0, tbt_ms=2.0)
    rows = [
        measurement.to_row(
            MeasuredEngine(engine, "100m", work, "bf16"),
            EngineMeasurement((OfflineRun(speed, 10, 20, 0),), (), {}),
            limit,
        )
        for engine, speed in (("ours", 50.0), ("peer", 30.0), ("ours", 100.0))
    ]
    assert [row["share_of_limit"] for row in rows] == [0.25, 0.15, 0.5]
    lines = measurement.tables(rows).splitlines()
    assert lines[2] == "| model | dtype | workload | batch | limit | ours | peer |"
    assert lines[4] == "| 100m | bf16 | base | 1 | 200 | 100 | 30 |"


def result(prompt: Sequence[int], tokens: int, cached_tokens: int = 0) -> Result:
    """An answer whose first token came after two seconds and each further one after another half."""
    output = Output(0, "", tuple(range(tokens)), FinishReason.LENGTH, ())
    return Result(tuple(prompt), (output,), (), cached_tokens, tuple(2 + turn / 2 for turn in range(tokens)))


@dataclass
class FakeLLM:
    """Answers at once; notes what it was asked."""

    cached_tokens: int = 0
    asked: list[tuple[int, ...]] = field(default_factory=list[tuple[int, ...]])

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        adapters: Sequence[str | None],
    ) -> Sequence[Result]:
        self.asked += map(tuple, prompts)
        return [
            result(prompt, param.max_tokens or 0, self.cached_tokens)
            for prompt, param, _ in zip(prompts, params, adapters, strict=True)
        ]


def test_our_harness_reports_what_the_peers_report(tmp_path: Path) -> None:
    work, llm = workload.make("mixed", 2, ADAPTERS, SHORT), FakeLLM()
    path = tmp_path / "report.json"
    path.write_text(json.dumps(harness.measure(llm, work, repeats=3, quiet_s=0)))
    name, found = measurement.read(path)
    assert name == work.name
    assert [(run.ttft_ms, run.tbt_ms) for run in found.runs] == [(2000, 500)] * 3
    assert found.token_ids == ((0, 1, 2, 3), (0, 1, 2, 3))
    assert len(set(llm.asked)) == len(llm.asked) == 2 + 3 * 2


def test_a_cached_prompt_voids_the_run() -> None:
    with pytest.raises(harness.PromptWasCached):
        harness.measure(FakeLLM(cached_tokens=16), workload.make("base", 1, ADAPTERS, SHORT), 1, 0)


def test_an_engine_that_fails_is_quoted_and_one_that_hangs_is_ended(tmp_path: Path) -> None:
    with pytest.raises(EngineFailed, match="no such luck"):
        execute([sys.executable, "-c", "raise SystemExit('no such luck')"], tmp_path / "log", 60)
    with pytest.raises(EngineFailed, match="took over"):
        execute([sys.executable, "-c", "import time; time.sleep(600)"], tmp_path / "log", 0.2)


WRITE = """
import json, pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--out-dir") + 1])
for place, option in enumerate(sys.argv):
    if option == "--workload":
        path = pathlib.Path(sys.argv[place + 1])
        rows = json.loads(path.read_text())
        run = dict(wall_s=1, output_tok_s=len(rows), ttft_mean_s=1, tpot_mean_s=1, others=0)
        tokens = [dict(token_ids=row["prompt_token_ids"][:2]) for row in rows]
        (out / path.name).write_text(json.dumps(dict(workload=path.stem, runs=[run], requests=tokens)))
"""


@dataclass(frozen=True)
class FakeEngine:
    """A process that reads the workloads and writes results, or fails."""

    name: str
    program: str = WRITE
    needs: Sequence[Path] = ()

    def commands(self, job: OfflineJob) -> Sequence[Sequence[str]]:
        return ([sys.executable, "-c", self.program, *job.options()],)


def test_a_comparison_runs_every_engine_and_survives_one_that_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = bench_engine.parse(["--batches", "1,2", "--quiet-wait", "0", "--prompt-tokens", "9"])
    rates = Rates(1e9, {"bf16": 1e9})
    model = bench_engine.ModelUnderTest(tmp_path / "m", ADAPTERS, LlamaShape(4, 1, 1, 1, 4, 4, 10), rates)
    comparison = bench_engine.prepare(model, "mixed", options, tmp_path)
    engines = [
        FakeEngine("ours"),
        FakeEngine("broken", "raise SystemExit(3)"),
        FakeEngine("peer"),
    ]
    rows = list(comparison.rows(engines))
    assert [(row["engine"], row["batch"], row["output_tok_s"], row["same_answers"]) for row in rows] == [
        ("ours", 1, 1, 1.0),
        ("ours", 2, 2, 1.0),
        ("peer", 1, 1, 1.0),
        ("peer", 2, 2, 1.0),
    ]
    assert "broken on m: exit status 3" in capsys.readouterr().out


def test_a_baseline_that_is_not_installed_is_named_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, baseline = Loraserve(), Transformers(scripts=tmp_path, home=tmp_path)
    assert bench_engine.installed([ours, baseline]) == [ours]
    assert "transformers+peft is left out" in capsys.readouterr().out
