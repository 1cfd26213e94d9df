"""Padding changes what a step costs and nothing that it says; the trials are what the figure claims."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.assembly.assembly import Engine, assemble
from engine.config.config import EngineConfig
from engine.runner.base import Computation
from engine.runner.executor import FinishedComputation, StepOutputs
from lora.adapter import AdapterRef
from lora.segments import AdapterLease, GroupWeights
from scheduler.plan import StepPlan
from scheduler.request import Request, SamplingParams
from scripts.bench.interference.__main__ import SwitchedExecutor, trials
from scripts.bench.interference.draw import draw
from scripts.bench.interference.padded import PaddedExecutor, pad
from scripts.results import read_last_run

ADAPTERS = tuple(AdapterRef(f"{at}", f"a{at}", 8 << at % 5, ("q_proj",), 1) for at in range(35))


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = assemble(EngineConfig(max_model_len=128, kv_cache_bytes=8 << 20, progress=False), PaddedExecutor)
    yield made
    made.close()


def _answers(engine: Engine) -> dict[str, list[int | None]]:
    """Greedy answers of every adapter at once."""
    answers: dict[str, list[int | None]] = {}
    for entry in engine.store.registry.entries():
        ref = engine.store.registry.resolve(entry.name)
        params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, seed=0)
        engine.core.submit(Request(entry.name, tuple(range(1, 12)), ref, params, (), 0.0))
        answers[entry.name] = []
    for _ in range(100):
        for event in engine.core.step().events:
            answers[event.key.request_id].append(event.token_id)
    return answers


def test_padded_kernels_answer_as_exact_ones(engine: Engine) -> None:
    exact = assemble(EngineConfig(max_model_len=128, kv_cache_bytes=8 << 20, progress=False))
    told = _answers(engine)
    assert told == _answers(exact)
    assert len(told) > 1
    assert all(len(tokens) == 6 for tokens in told.values())
    exact.close()


def test_padding_adds_rows_of_zeros_site_by_site(engine: Engine) -> None:
    ref = engine.store.registry.resolve(engine.store.registry.entries()[0].name)
    engine.store.loader.prefetch((ref,))
    for _ in range(100):
        if ref.digest in engine.store.ready():
            break
        engine.wait_ready()
    with engine.store.acquire((ref,)) as lease:
        group = next(iter(lease.weights[ref.digest].groups.values()))
        padded = pad(group, 2 * ref.rank)
        assert padded.A.shape == (2 * ref.rank * len(group.parts), group.A.shape[1])
        x = torch.randn(3, group.A.shape[1], generator=torch.Generator().manual_seed(0))
        for before, after in zip(_updates(group, x), _updates(padded, x), strict=True):
            torch.testing.assert_close(after, before)


def _updates(group: GroupWeights, x: torch.Tensor) -> list[torch.Tensor]:
    h = x @ group.A.float().T * group.scale
    return [h[:, part.rank_start : part.rank_stop] @ part.Bt.float() for part in group.parts]


def test_the_trials_have_distinct_adapters_of_the_ranks_they_name() -> None:
    found = list(trials(ADAPTERS))
    assert {trial.rank for trial in found} == {0, 8, 16, 32, 64, 128}
    assert len({trial.batch for trial in found}) == 2
    for trial in found:
        parts = trial.case.decoding or trial.case.prefilling
        assert (trial.metric == "tbt") == bool(trial.case.decoding)
        ranks = [part.adapter.rank for part in parts]
        few = trial.batch.startswith("one")
        assert ranks == ([8] + [trial.rank] * 5 if few else [8] * 6 + [trial.rank])
        adapters = [part.adapter for part in parts if not part.adapter.is_base]
        assert len(set(adapters)) == len(adapters)


def test_a_switch_is_the_executor_that_it_names() -> None:
    @dataclass
    class Never:
        def launch(self, plan: StepPlan, lease: AdapterLease) -> Computation:
            raise AssertionError("the other one was asked for")

    @dataclass
    class Empty:
        def launch(self, plan: StepPlan, lease: AdapterLease) -> Computation:
            return FinishedComputation(StepOutputs((), ()))

    switch = SwitchedExecutor({"exact": Never(), "padded": Empty()})
    switch.current = "padded"
    assert switch.launch(StepPlan(()), AdapterLease({}, lambda: None)).outputs() == StepOutputs((), ())


def test_the_figure_has_a_panel_for_each_batch_and_metric(tmp_path: Path) -> None:
    said = {
        "seconds": [0.1, 0.2, 0.4],
        "model_s": {"exact": 0.1, "padded": 0.2, "multi-rank": 0.1},
        "started": "1",
        "hardware": "h",
        "base_model": "b",
    }
    names = ("company", "metric", "kernel", "neighbour_rank")
    places = itertools.product(("few", "many"), ("tbt", "ttft"), ("exact", "padded"), (0, 8))
    rows = [dict(zip(names, place, strict=True)) | said for place in places]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    drawn = draw(read_last_run(path))
    assert len(drawn.axes) == 4
    dots = [line for line in drawn.axes[0].lines if line.get_linestyle() == "None"]
    assert [np.asarray(line.get_ydata()).tolist() for line in dots] == [[200, 200], [200, 200]]
    drawn.savefig(tmp_path / "figure.png")
