"""The cluster's suites: each runs from nothing to a picture, keeps its rows, and goes on where it was."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from scheduler.cluster.cost.model import Kernel
from scheduler.cluster.cost.profile import Slo, from_json
from scheduler.cluster.policies import OURS
from scheduler.sim.spec import FaultKind
from scheduler.sim.workload.trace import Arrival
from scripts.bench.simulator import __main__ as bench_simulator
from scripts.figures import latency_by_rank, matrix, nodes_needed, overload, rank_interference
from scripts.figures.cluster_run import PROFILE, ClusterRun, hardware, read_traces, traffic
from scripts.figures.fault_plans import fault_plan
from scripts.figures.matrix import CELLS, values
from scripts.figures.rank_interference import step_s
from scripts.figures.roofline import H100, LLAMA_8B, derived
from scripts.figures.rows import SuiteRows
from scripts.figures.suite import Suite, main

SUITES = [module.SUITE for module in (latency_by_rank, matrix, nodes_needed, overload, rank_interference)]
TRACES = read_traces(None)
SHIPPED = Path(__file__).parents[2] / "scheduler" / "cluster" / "profiles" / "h100_llama8b.json"


@pytest.mark.slow
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


def test_a_cell_of_the_matrix_has_the_rows_of_its_own_runs_only() -> None:
    first, second = CELLS[:2]
    rows = [
        {"asked": asdict(replace(cell.run, policy=policy, seed=seed)), "in_time": part}
        for cell, policy, seed, part in (
            (first, "ours", 10, 0.9),
            (first, "ours", 11, 0.8),
            (first, "paper", 10, 0.7),
            (first, "ours", 0, 0.1),
            (second, "ours", 10, 0.2),
        )
    ]
    assert values(rows, first) == {"ours": [0.9, 0.8], "paper": [0.7]}
    assert len({(cell.run, cell.policies) for cell in CELLS}) == len(CELLS)


def test_a_plan_of_faults_counts_from_where_the_traffic_begins() -> None:
    (crash,) = fault_plan("crash:10:5", 4, 30.0, 100.0, 0)
    assert (crash.kind, crash.start_s, crash.lasts_s, len(crash.nodes)) == (FaultKind.CRASH, 40.0, 5.0, 1)
    storm = fault_plan("storm:20", 4, 30.0, 100.0, 0)
    assert [fault.start_s for fault in storm] == [50.0, 70.0, 90.0]
    rolling = fault_plan("rolling:10", 4, 30.0, 100.0, 0)
    assert sorted(fault.nodes[0] for fault in rolling) == ["n0", "n1", "n2", "n3"]
    with pytest.raises(ValueError, match=r"^faults='crash:1'"):
        fault_plan("crash:1", 4, 30.0, 100.0, 0)


def _traffic(**options: Any) -> Sequence[Arrival]:
    return traffic(
        replace(ClusterRun("ours", rate=8.0, seconds=60.0, lead_s=5.0), **options), TRACES
    ).arrivals


def test_traffic_is_the_same_for_every_policy_and_node() -> None:
    plain = _traffic()
    assert plain == _traffic(policy="paper", kernel="exact", true_kernel="fixed", sigma=0.5, memory_gib=9.0)
    assert plain != _traffic(seed=1)
    assert min(each.call.arrival_s for each in plain) >= 5.0


def test_each_option_of_the_traffic_changes_only_its_own() -> None:
    plain, heavy, talking = _traffic(), _traffic(lengths="burstgpt"), _traffic(turns=4.0, tenants=10)
    crowd = _traffic(curve="step:3:20:15")
    assert [each.call.arrival_s for each in plain] == [each.call.arrival_s for each in heavy]
    assert [each.adapter for each in plain] == [each.adapter for each in heavy]
    assert [each.call.output_tokens for each in plain] == [each.call.output_tokens for each in talking]
    assert len(crowd) == pytest.approx(len(plain) * (1 + 2 * 15 / 60), abs=2)
    assert sum(25 <= each.call.arrival_s < 40 for each in crowd) > len(crowd) / 3
    assert len({each.tenant for each in talking}) == 10


def test_policies_are_told_the_profile_and_nodes_run_what_is_true() -> None:
    run = ClusterRun("ours", kernel="exact", true_kernel="fixed", sigma=0.1, seconds=5.0)
    spec = hardware(run, traffic(run, TRACES)).node(OURS.residency)
    assert spec.model == PROFILE.model(Kernel.EXACT)
    assert spec.deviation.model == PROFILE.model(Kernel.FIXED)


@pytest.mark.slow
def test_the_simulator_is_timed(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    bench_simulator.main(["--quick", "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["asked"]["what"].split()[0] for row in rows} == {"place", "route", "growth", "hour"}
