"""Timed steps of the embedded engine, the cases, and the way from rows to a profile."""

import itertools
import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest

from engine.assembly.assembly import Engine, assemble
from engine.config.config import EngineConfig
from lora.adapter import BASE, AdapterRef
from scheduler.cluster.cost.fit import Measurement
from scheduler.cluster.cost.model import AdapterLoad, CostModel, Kernel, StepLoad
from scheduler.cluster.cost.profile import from_json
from scripts.profile_node import __main__ as profile_node
from scripts.profile_node import step_cases, step_rows
from scripts.profile_node.step_timer import (
    TIMED_STEPS,
    CaseNotFinished,
    CaseSequence,
    StepCase,
    StepEnds,
    StepTimer,
)

TRUTH = CostModel(Kernel.EXACT, 1e-2, 4e-4, 5e-4, 3e-6, 4e-5, 3e-6, 8e-4, 9e-5, 5e-7)
ADAPTERS = tuple(AdapterRef(f"{at}", f"a{at}", 8 << at % 5, ("q_proj",), 1) for at in range(20))


@pytest.fixture(scope="module")
def node() -> Iterator[tuple[Engine, StepEnds]]:
    """The embedded model, 16 rows a step, watched by a clock that counts how often it is read."""
    ticks = itertools.count()
    ends = StepEnds(clock=lambda: float(next(ticks)))
    config = EngineConfig(
        max_num_batched_tokens=16, max_model_len=256, kv_cache_bytes=8 << 20, progress=False
    )
    engine = assemble(config, ends.around)
    yield engine, ends
    engine.close()


def test_what_cannot_be_read_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "other.jsonl").write_text("no row\n")
    for rows, says in (
        ("none", "No such file"),
        ("empty.jsonl", "no row of a node"),
        ("other.jsonl", "Expecting"),
    ):
        given = ["fit", "--rows", str(tmp_path / rows), "--profile", str(tmp_path / "made.json")]
        monkeypatch.setattr("sys.argv", ["profile_node", *given])
        with pytest.raises(SystemExit, match=f"^python -m scripts.profile_node: .*{says}"):
            profile_node.main()


def test_the_timer_times_the_steps_that_were_asked_for(node: tuple[Engine, StepEnds]) -> None:
    engine, ends = node
    reverse, upper = (
        engine.store.registry.resolve(entry.name) for entry in engine.store.registry.entries()[:2]
    )
    timer = StepTimer(engine, ends, seed=0)
    timer.warm([reverse, upper])
    case = StepCase(
        (CaseSequence(BASE, 5), CaseSequence(reverse, 9), CaseSequence(reverse, 3), CaseSequence(upper, 4)),
        (CaseSequence(upper, 20),),
    )
    decoding, *reading = timer.measure(case)
    loads = {part.rank: part for part in decoding.load.adapters}
    assert sum(part.decode_sequences for part in loads.values()) == 4
    assert loads[0] == AdapterLoad(0, 0, 1)
    assert decoding.load.prompt_pairs == 0
    assert decoding.load.context_tokens == pytest.approx(5 + 9 + 3 + 4 + 4 * 4, abs=4 * TIMED_STEPS)
    prompts = [sum(part.prefill_tokens for part in row.load.adapters) for row in reading]
    assert prompts == [12, 8], "16 rows a step, of which four decode"
    assert sum(row.load.prompt_pairs for row in reading) == 20 * 21 // 2
    assert all(row.step_s > 0 for row in (decoding, *reading))
    assert engine.core.num_live_requests == 0


def test_the_same_case_is_the_same_steps_again(node: tuple[Engine, StepEnds]) -> None:
    engine, ends = node
    timer = StepTimer(engine, ends, seed=1)
    case = StepCase(
        (CaseSequence(BASE, 40), CaseSequence(BASE, 3)), (CaseSequence(BASE, 7), CaseSequence(BASE, 7))
    )
    first, second = ([row.load for row in timer.measure(case)] for _ in range(2))
    assert first == second


def test_a_case_that_the_engine_cannot_run_says_so(node: tuple[Engine, StepEnds]) -> None:
    engine, ends = node
    with pytest.raises((CaseNotFinished, ValueError)):
        StepTimer(engine, ends, seed=0).measure(StepCase((CaseSequence(BASE, 400),)))


def test_the_grid_moves_every_rank_and_keeps_its_bounds() -> None:
    bounds = step_cases.CaseBounds(sequences=8, prompt_tokens=64)
    planned = list(step_cases.grid(ADAPTERS, bounds))
    parts = [part for case in planned for part in (*case.decoding, *case.prefilling)]
    assert {part.adapter.rank for part in parts} == {0, 8, 16, 32, 64, 128}
    assert max(len(case.decoding) for case in planned) == 8
    assert max(part.prompt_tokens for part in parts) == 64


def test_draws_depend_on_the_seed_and_keep_their_bounds() -> None:
    bounds = step_cases.CaseBounds(sequences=8, prompt_tokens=64)
    one, same, other = (list(step_cases.draws(ADAPTERS, bounds, 50, Random(seed))) for seed in (1, 1, 2))
    assert one == same
    assert one != other
    assert all(1 <= len(case.decoding) <= 8 for case in one)
    assert all(8 <= part.prompt_tokens <= 64 for case in one for part in (*case.decoding, *case.prefilling))
    assert {len(case.prefilling) for case in one} == {0, 1, 2, 3}


def test_doublings() -> None:
    assert step_cases.doublings(40) == [1, 2, 4, 8, 16, 32]
    assert step_cases.doublings(512, least=16) == [16, 32, 64, 128, 256, 512]


def test_a_row_survives_its_file() -> None:
    measured = Measurement(StepLoad((AdapterLoad(0, 0, 3), AdapterLoad(8, 5, 0)), 70, 15), 0.0123)
    assert step_rows.from_row(json.loads(json.dumps(step_rows.to_row(measured)))) == measured


def test_like_steps_become_their_mean() -> None:
    one, two = (StepLoad((AdapterLoad(8, 0, count),), 9) for count in (1, 2))
    rows = [Measurement(one, 3.0), Measurement(two, 5.0), Measurement(one, 1.0), Measurement(one, 5.0)]
    assert step_rows.means(rows) == [Measurement(one, 3.0), Measurement(two, 5.0)]


def _rows(rng: np.random.Generator) -> Iterator[str]:
    yield json.dumps(
        {"what": "node", "hardware": "h", "base_model": "b", "step_prompt_tokens": 256, "kv_tokens": 10_000}
    )
    for _ in range(120):
        ranks = rng.choice([0, 8, 16, 32, 64, 128], 4)
        prompt = int(rng.integers(0, 200) * rng.integers(0, 2))
        parts = [AdapterLoad(int(rank), prompt, int(rng.integers(0, 8))) for rank in ranks]
        load = StepLoad(tuple(parts), int(rng.integers(10, 4000)), 4 * prompt * (prompt + 1) // 2)
        for _ in range(3):
            yield json.dumps(step_rows.to_row(Measurement(load, TRUTH.step_s(load) * rng.normal(1, 0.02))))


def test_rows_become_a_measured_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = Namespace(rows=tmp_path / "rows.jsonl", profile=tmp_path / "node.json", ttft_s=2.0, tbt_s=0.2)
    options.mean_prompt_tokens, options.mean_output_tokens = 128.0, 32.0
    options.rows.write_text("\n".join(_rows(np.random.default_rng(3))))
    profile_node.fit(options)
    profile = from_json(options.profile.read_text())
    assert (profile.provenance, profile.hardware, profile.limits.kv_tokens) == ("measured", "h", 10_000)
    found = profile.model(Kernel.EXACT)
    assert found.base_s == pytest.approx(TRUTH.base_s, rel=0.1)
    assert found.prefill_token_s + found.crowded_row_s == pytest.approx(TRUTH.prefill_token_s, rel=0.1)
    assert profile.model(Kernel.PADDED).coefficients == found.coefficients
    said = capsys.readouterr().out
    assert "360 timed steps of 120 kinds" in said
    assert (
        "held-out error (five folds): median 0." in said or "held-out error (five folds): median 1." in said
    )
    assert "rank 128:" in said
