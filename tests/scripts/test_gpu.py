"""The check of a GPU, run dry on a CPU: every section runs, a wrong kernel is found, and what is lacking is skipped."""

import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora.ops.base import LoraOp, LoraStep
from lora.ops.grouped import GroupedLora
from lora.segments import SegmentTable
from lora.target_modules import BaseShape, SiteGroup
from scripts.gpu import __main__ as gpu
from scripts.gpu import sections
from scripts.gpu.backends.base import Run
from scripts.gpu.backends.dry_run import DryRunBackends
from scripts.gpu.context import CheckContext, relative_error
from scripts.gpu.correctness.inputs import ProjectionInput, adapter, table_of, with_adapters
from scripts.gpu.finding import Finding, Verdict, check, goal, measured, summary
from scripts.gpu.sections import SECTIONS, Section
from scripts.gpu.sizes import TINY
from scripts.gpu.timing import machine
from scripts.gpu.timing.timed_model import MIXES

NAMES = {
    "machine": ("torch", "copy", "matrix product"),
    "lora": (
        "lora gate_up, decode, distinct, 64 wide, bfloat16",
        "heads, mixed, 64 wide, float32",
        "add down, prefill, 64 wide, float32",
        "gate, base alone, 64 wide, bfloat16",
        "lora down, decode, shared, in fp8, 64 wide, bfloat16",
    ),
    "attention": ("reserved decode, torch, 8 of 32 heads of 128, bf16", "mixed, torch, window of 70, bf16"),
    "rows": (
        "norm, 64 wide, float32",
        "fp8 product of 67 rows, 64 wide",
        "sampling, all filters",
        "sampling, penalties",
    ),
    "engine": (
        "tokens, graphs",
        "tokens, graphs, shared memory",
        "tokens, no graphs",
        "tokens, graphs, preempted",
        "tokens, penalties",
        "log-probabilities, bfloat16",
    ),
    "table": ("70/20/8/2 %, 8 sequences", "all 128, 4 sequences", "one of 128 among 31 of 8"),
    "serving": (
        "prefill, 0 adapters, 8 sequences",
        "decode, 8 adapters, 8 sequences",
        "host, 4 adapters, 8 sequences",
    ),
    "loading": ("bare copy", "load beside decode", "step, loading"),
    "launching": ("graph node", "nodes, rank 8", "replay, base"),
    "vendor_kernels": ("ours", "vllm", "sglang"),
}
KERNELS = ("--dry-run", "--quiet", "--only", "lora")


def run(out: Path, *arguments: str, **seams: Any) -> tuple[int, list[dict[str, Any]]]:
    """The exit code, and the rows that were written."""
    code = gpu.main([*arguments, "--out", str(out / "rows.jsonl")], **seams)
    return code, [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_dry_run_runs_every_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, rows = run(tmp_path, "--dry-run", "--quiet")
    assert [row for row in rows if row["verdict"] == "failed"] == []
    assert code == 0
    assert list(dict.fromkeys(row["section"] for row in rows)) == [section.name for section in SECTIONS]
    found = {(row["section"], row["name"]) for row in rows}
    assert {(section, name) for section, names in NAMES.items() for name in names} <= found
    assert all(row["limit"] is not None for row in rows if row["verdict"] in ("ok", "met", "missed"))
    told = capsys.readouterr().out
    assert all(name in told for names in NAMES.values() for name in names), "the table has every row"


class Forgetful:
    """A LoRA op that leaves out the last adapter's rows."""

    def plan(self, table: SegmentTable) -> LoraStep:
        return GroupedLora().plan(SegmentTable(table.segments[:-1]))


class Wavering:
    """A LoRA op whose last bits depend on how often it was called."""

    def __init__(self) -> None:
        self._calls = 0

    def plan(self, table: SegmentTable) -> "WaveringStep":
        self._calls += 1
        return WaveringStep(GroupedLora().plan(table), self._calls)


class WaveringStep:
    def __init__(self, step: LoraStep, calls: int) -> None:
        self._step, self._calls = step, calls

    def add_lora(self, y: Tensor, x: Tensor, layer: int, group: SiteGroup) -> None:
        self._step.add_lora(y, x, layer, group)
        y[0, 0] *= 1 + 1e-2 * self._calls


class Unfilled:
    """A LoRA op that writes NaN where it should add."""

    def plan(self, table: SegmentTable) -> LoraStep:
        return self

    def add_lora(self, y: Tensor, x: Tensor, layer: int, group: SiteGroup) -> None:
        y.fill_(torch.nan)


class Raising:
    """A LoRA op whose launch fails."""

    def plan(self, table: SegmentTable) -> LoraStep:
        raise RuntimeError("first line\nan illegal memory access")


class Wrong(DryRunBackends):
    """A dry run's backends with another LoRA op."""

    def __init__(self, kind: type) -> None:
        self._kind = kind

    def lora(self, base: BaseShape, dtype: torch.dtype) -> LoraOp:
        return self._kind()


@pytest.mark.parametrize("kind", [Forgetful, Wavering, Unfilled, Raising])
def test_a_wrong_kernel_is_found(tmp_path: Path, kind: type) -> None:
    code, rows = run(tmp_path, *KERNELS, dry=Wrong(kind))
    wrong = [row for row in rows if row["verdict"] == "failed"]
    assert code == 1
    assert {"lora qkv, mixed, 64 wide, float32", "lora down, prefill, 64 wide, bfloat16"} <= {
        row["name"] for row in wrong
    }
    if kind is Raising:
        noted = {row["note"] for row in wrong if row["name"].startswith("lora ")}
        assert noted == {"RuntimeError: an illegal memory access"}
    if kind is Wavering:
        assert any("different bits" in row["note"] for row in wrong)


def test_what_the_time_does_not_reach_is_skipped(tmp_path: Path) -> None:
    """The clock stands until the copy has been timed, and then jumps past the limit."""
    copied = threading.Event()

    class Copying(DryRunBackends):
        def times_ms(self, run: Run, count: int) -> list[float]:
            copied.set()
            return super().times_ms(run, count)

    def clock() -> float:
        return 600.0 if copied.is_set() else 0.0

    code, rows = run(tmp_path, "--dry-run", "--quiet", "--limit-s", "60", dry=Copying(), clock=clock)
    skipped = {(row["section"], row["name"]): row["note"] for row in rows if row["verdict"] == "skipped"}
    assert code == 0
    assert skipped.pop(("machine", "matrix product")) == "no time is left"
    assert set(skipped) == {(section.name, section.name) for section in SECTIONS[1:]}
    assert skipped["table", "table"] == "0 s are left, it needs 60"


def test_a_section_that_raises_or_lacks_a_package_hides_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(context: CheckContext) -> Iterator[Finding]:
        yield measured("before", 1.0)
        raise ValueError("it broke")

    def lacking(context: CheckContext) -> Iterator[Finding]:
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers")

    chosen = [Section("a", broken, 0), Section("b", lacking, 0), Section("c", machine.findings, 0)]
    context = CheckContext(DryRunBackends(), TINY, lambda: 0.0, 60.0, seed=1)
    rows = sections.run(chosen, context, lambda row: None)
    assert [(row.name, row.verdict) for row in rows[:3]] == [
        ("before", Verdict.MEASURED),
        ("a", Verdict.FAILED),
        ("b", Verdict.SKIPPED),
    ]
    assert rows[1].note == "ValueError: it broke"
    assert rows[2].note == "transformers is not installed"
    assert rows[-1].name == "matrix product"
    assert "it broke" in capsys.readouterr().err


def test_without_a_device_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--dry-run"):
        run(tmp_path)


def test_a_dry_run_meets_no_goal_but_its_checks_count() -> None:
    fast, wrong = goal("x", 0.1, 1.0, "ms").untimed(), check("x", 2.0, 1.0).untimed()
    assert (fast.verdict, fast.limit, wrong.verdict) == (Verdict.MEASURED, 1.0, Verdict.FAILED)


def test_the_summary_names_what_is_to_be_looked_at() -> None:
    rows = [check("a", 0.0, 1.0), check("b", 2.0, 1.0), goal("c", 2.0, 1.0, "ms"), measured("d", 1.0)]
    told = summary([row.within("s") for row in rows]).splitlines()
    assert told == ["4 rows: 1 ok, 1 failed, 1 missed, 1 measured", "FAILED: s: b", "missed: s: c"]


def test_every_row_is_json() -> None:
    row = goal("x", math.nan, 1.0, "of floor", efficiency=math.nan, base_ms=1.5).within("s")
    told = json.loads(row.as_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (told["value"], told["facts"]) == ("nan", {"efficiency": "nan", "base_ms": 1.5})


def test_nan_never_passes() -> None:
    assert check("x", math.nan, 1.0).verdict is Verdict.FAILED
    assert goal("x", math.nan, 1.0, "ms").verdict is Verdict.MISSED
    want = torch.ones(3)
    assert not relative_error(torch.tensor([1.0, math.nan, 1.0]), want) <= 1
    assert relative_error(torch.ones(2), want) == math.inf


def test_mixes_have_as_many_adapters_as_are_asked_for() -> None:
    for count in (4, 8, 32, 64, 128):
        assert all(len(mix(count)) == count for mix in MIXES.values())
    shares = MIXES["70/20/8/2 %"](128)
    assert [shares.count(rank) for rank in (8, 16, 64, 128)] == [89, 26, 10, 3]
    assert MIXES["all 8"](0) == MIXES["uniform 8..128"](0) == []


def test_the_oracle_is_the_equation_row_by_row() -> None:
    """By one matrix a site, as PEFT would merge it."""
    context = CheckContext(DryRunBackends(), TINY, lambda: 0.0, 60.0, seed=3)
    base = TINY.layers[0].base_shape()
    adapters = [adapter(context, base, torch.float32, rank) for rank in (5, 8)]
    table = table_of([(2, 0), (1, None), (3, 1)], adapters)
    given = ProjectionInput(context.normal(6, 64), context.normal(6, base.group_out(SiteGroup.QKV)))
    found = with_adapters(given, table, 0, SiteGroup.QKV)
    for row, index in enumerate((0, 0, None, 1, 1, 1)):
        want = given.y[row].double()
        weights = adapters[index].groups[0, SiteGroup.QKV] if index is not None else None
        for part in weights.parts if weights else ():
            assert weights is not None
            A = weights.A[part.rank_start : part.rank_stop].double()
            merged = part.Bt.double().t() @ (2.0 * A)
            want[part.out_start : part.out_stop] += merged @ given.x[row].double()
        torch.testing.assert_close(found[row], want)
