"""The capacity planner: its search against a known answer, and its command from trace to number."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from scheduler.cluster.profile import Slo
from scheduler.cluster.state import OperatingPoints
from scheduler.sim.outcome import Outcome
from scheduler.sim.plan import fewest, least_nodes, trials
from scheduler.sim.trace import Call
from scheduler.sim.workload import Arrival
from tests.scheduler.cluster.lossy import adapter

SLO = Slo(ttft_s=1.0, tbt_s=0.05)


def _outcome(ttft_s: float = 0.5, tbt_s: float = 0.01, served: int = 10) -> Outcome:
    return Outcome(10, served, 10 - served, ttft_s, ttft_s, tbt_s, tbt_s, 1.0, 0, 0.5)


def _needing(nodes: int) -> Callable[[int], Outcome]:
    return lambda tried: _outcome(ttft_s=0.5 if tried >= nodes else 5.0)


@pytest.mark.parametrize("needed", range(1, 33))
@pytest.mark.parametrize("least", [1, 3])
def test_the_search_finds_the_fewest_in_few_trials(needed: int, least: int) -> None:
    made = trials(_needing(needed), SLO, least, 32)
    assert fewest(made) == max(needed, least)
    assert len(made) == len({trial.nodes for trial in made}) <= 10


def test_more_than_the_most_is_said_to_be_needed() -> None:
    made = trials(_needing(40), SLO, 2, 32)
    assert fewest(made) is None
    assert max(trial.nodes for trial in made) == 32


@pytest.mark.parametrize("bad", [_outcome(ttft_s=1.1), _outcome(tbt_s=0.06), _outcome(served=9)])
def test_each_bound_and_every_request_counts(bad: Outcome) -> None:
    assert fewest(trials(lambda nodes: bad, SLO, 1, 2)) is None


def test_the_least_is_the_work_over_what_a_node_sustains() -> None:
    """By hand: 100 requests of 200 tokens on OP 1,000 and 100 on OP 500 are 20 + 40 node-seconds, in 14 s."""
    points = OperatingPoints((8, 16), (1000.0, 500.0))
    arrivals = [
        Arrival(f"{ref.name}{at}", Call(0.1, 150, 50), ref)
        for ref in (adapter("a", 8), adapter("b", 16))
        for at in range(100)
    ]
    assert least_nodes(arrivals, points, 14.0) == 4
    assert least_nodes(arrivals, points, 1e6) == 1


def test_the_command_reads_a_trace_and_says_how_many_nodes(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rows = (f"2023-11-16 18:00:{at // 20:02d}.{at % 20:02d}00000,800,60" for at in range(400))
    trace.write_text("\n".join(("TIMESTAMP,ContextTokens,GeneratedTokens", *rows)))
    command = [
        sys.executable,
        "-m",
        "scheduler.sim",
        "plan",
        str(trace),
        "--seconds",
        "20",
        "--adapters",
        "12",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.returncode == 0
    assert "derived profile" in done.stdout
    assert done.stdout.splitlines()[-1] == "nodes needed: 1"
    strict = subprocess.run(
        [*command, "--tbt-s", "0.001", "--most", "2"], capture_output=True, text=True, check=False
    )
    assert strict.returncode != 0
