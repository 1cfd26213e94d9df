"""The cluster's suites: each runs from nothing to a picture, keeps its rows, and goes on where it was."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from scheduler.cluster.cost.model import Kernel
from scheduler.cluster.cost.profile import Slo, from_json
from scripts.bench.simulator import __main__ as bench_simulator
from scripts.figures import (
    ablations,
    latency_by_rank,
    nodes_needed,
    policies,
    rank_interference,
    timelines,
    workloads,
)
from scripts.figures.policies import WORKLOADS, runs_of, throughput, throughputs
from scripts.figures.rank_interference import step_s
from scripts.figures.roofline import H100, LLAMA_8B, derived
from scripts.figures.rows import SuiteRows
from scripts.figures.suite import Suite, main

SUITES = [
    module.SUITE
    for module in (
        ablations,
        latency_by_rank,
        nodes_needed,
        policies,
        rank_interference,
        timelines,
        workloads,
    )
]
SHIPPED = Path(__file__).parents[2] / "scheduler" / "cluster" / "profiles" / "h100_llama8b.json"


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.name)
def test_a_suite_runs_and_asks_nothing_twice(suite: Suite, tmp_path: Path) -> None:
    main(suite, ["--quick", "--out", str(tmp_path)])
    rows = tmp_path / f"{suite.name}.jsonl"
    before = rows.read_text()
    assert len(before.splitlines()) > 1
    assert all(json.loads(line)["commit"] for line in before.splitlines())
    for picture in suite.pictures:
        assert (tmp_path / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    rows.write_text("".join(before.splitlines(keepends=True)[1:]))
    main(suite, ["--quick", "--out", str(tmp_path)])
    assert sorted(rows.read_text().splitlines()) == sorted(before.splitlines())


def test_rows_answer_once_unless_asked_anew(tmp_path: Path) -> None:
    path, asked = tmp_path / "rows.jsonl", {"policy": "ours", "rate": 1.0}
    path.write_text(json.dumps({"asked": asked, "value": 1, "commit": "another"}) + "\n")
    assert SuiteRows(path).ask(asked, lambda: {"value": 2})["value"] == 1
    assert SuiteRows(path, anew=("paper",)).ask(asked, lambda: {"value": 2})["value"] == 1
    rows = SuiteRows(path, anew=("ours",))
    assert rows.ask(asked, lambda: {"value": 2})["value"] == 2
    assert rows.ask(asked, lambda: {"value": 3})["value"] == 2
    rows.tidy()
    assert [json.loads(line)["value"] for line in path.read_text().splitlines()] == [2]


def test_the_derived_h100_is_the_one_that_is_shipped() -> None:
    """Two derivations of one node, by hand in the file and by formula here."""
    shipped = from_json(SHIPPED.read_text()).model(Kernel.EXACT)
    model = derived(LLAMA_8B, H100, Slo(2.0, 0.05)).model(Kernel.EXACT)
    assert model.coefficients == pytest.approx(shipped.coefficients, rel=0.01)


def test_one_large_neighbour_costs_its_own_rows_where_kernels_are_exact() -> None:
    """By hand: 120 more rows of 1.747 us; padded, all 32 adapters pay them."""
    exact, padded = (
        step_s(kernel, 31, 1, 128, "tbt") - step_s(kernel, 31, 1, 8, "tbt")
        for kernel in (Kernel.EXACT, Kernel.PADDED)
    )
    assert exact == pytest.approx(120 * 1.755e-6, rel=0.02)
    assert padded == pytest.approx(32 * exact, rel=0.01)


def test_throughput_is_the_highest_rate_within_the_slo() -> None:
    load = WORKLOADS[0]
    rows = [
        {
            "asked": asdict(load.run("ours", rate, seed)),
            "meets": rate <= 10 + seed,
        }
        for seed in (0, 1)
        for rate in (12.0, 10.0, 11.0)
    ]
    assert [row["asked"]["rate"] for row in runs_of(rows, load, "ours", 0)] == [10.0, 11.0, 12.0]
    assert throughputs(rows, load)["ours"] == [10.0, 11.0]
    assert throughputs(rows, load)["paper"] == []
    assert throughput([row | {"meets": False} for row in rows]) == 0.0


def test_the_simulator_is_timed(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    bench_simulator.main(["--quick", "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["asked"]["what"].split()[0] for row in rows} == {"place", "growth", "hour"}
