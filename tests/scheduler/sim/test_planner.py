"""The capacity planner: its search against a known answer, and its command from trace to number."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scheduler.cluster.cost.profile import Slo
from scheduler.cluster.state import EMPTY_TABLE, OperatingPoints
from scheduler.sim.outcome import Outcome
from scheduler.sim.planner.command import main
from scheduler.sim.planner.search import Trial, likely_nodes, trials, worst
from scheduler.sim.replay import Replay
from scheduler.sim.workload.trace import Arrival, Call
from tests.scheduler.cluster.lossy import adapter

SLO = Slo(ttft_s=1.0, tbt_s=0.05)


def _replay(
    ttft_s: float = 0.5, tbt_s: float = 0.01, served: int = 10, finished: bool = True, in_time: float = 1.0
) -> Replay:
    outcome = Outcome(10, served, 10 - served, ttft_s, ttft_s, tbt_s, tbt_s, 1.0, in_time)
    return Replay(finished, outcome, (), (), EMPTY_TABLE, {})


def _needing(nodes: int) -> Callable[[int], Replay]:
    return lambda tried: _replay(ttft_s=0.5 if tried >= nodes else 5.0)


def _fewest(made: list[Trial]) -> int | None:
    return min((trial.nodes for trial in made if trial.enough), default=None)


@pytest.mark.parametrize("needed", range(1, 33))
@pytest.mark.parametrize("first", [1, 3, 30])
def test_the_search_finds_the_fewest_in_few_trials(needed: int, first: int) -> None:
    made = trials(_needing(needed), SLO, first, 32)
    assert _fewest(made) == needed
    assert len(made) == len({trial.nodes for trial in made}) <= 10


def test_more_than_the_most_is_said_to_be_needed() -> None:
    made = trials(_needing(40), SLO, 2, 32)
    assert _fewest(made) is None
    assert max(trial.nodes for trial in made) == 32


@pytest.mark.parametrize(
    "bad", [_replay(ttft_s=1.1), _replay(tbt_s=0.06), _replay(served=9), _replay(finished=False)]
)
def test_each_bound_and_every_request_counts(bad: Replay) -> None:
    assert _fewest(trials(lambda nodes: bad, SLO, 1, 2)) is None


def test_of_several_seeds_the_first_that_fails_decides_and_else_the_worst() -> None:
    def runs(*parts: float) -> Iterator[Replay]:
        for part in parts:
            asked.append(part)
            yield _replay(ttft_s=0.5 if part > 0.9 else 5.0, in_time=part)

    asked: list[float] = []
    assert worst(SLO, runs(1.0, 0.95, 0.99)).outcome.in_time == 0.95
    asked.clear()
    assert worst(SLO, runs(1.0, 0.5, 0.1)).outcome.in_time == 0.5
    assert asked == [1.0, 0.5], "more seeds change nothing"


def test_the_search_begins_at_the_work_over_what_a_node_sustains() -> None:
    """By hand: 100 requests of 200 tokens on OP 1,000 and 100 on OP 500 are 20 + 40 node-seconds, in 14 s."""
    points = OperatingPoints((8, 16), (1000.0, 500.0))
    arrivals = [
        Arrival(f"{ref.name}{at}", Call(0.1, 150, 50), ref)
        for ref in (adapter("a", 8), adapter("b", 16))
        for at in range(100)
    ]
    assert likely_nodes(arrivals, points, 14.0) == 5
    assert likely_nodes(arrivals, points, 1e6) == 1


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half an hour at a request a second, and in the middle a minute at twenty."""
    times = sorted([float(at) for at in range(1800)] + [900 + at / 19 for at in range(19 * 60)])
    rows = (
        f"2023-11-16 18:{int(at // 60):02d}:{at % 60:010.7f},{200 + 37 * number % 800},{20 + number % 50}"
        for number, at in enumerate(times)
    )
    path = tmp_path_factory.mktemp("plan") / "trace.csv"
    path.write_text("\n".join(("TIMESTAMP,ContextTokens,GeneratedTokens", *rows)))
    return path


Plan = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str]) -> Plan:
    """Run the command in this process."""

    def run(*options: object) -> subprocess.CompletedProcess[str]:
        words = ["plan", *map(str, options)]
        try:
            code = main(words)
        except SystemExit as ended:
            code = ended.code
        told = capsys.readouterr()
        return subprocess.CompletedProcess(words, code, told.out, told.err)

    return run


def _process(*options: object) -> subprocess.CompletedProcess[str]:
    """Run the command as an operator does."""
    command = [sys.executable, "-m", "scheduler.sim", "plan", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _asked(
    trace: Path, adapters: object = 12, ttft_s: float = 2.0, tbt_s: float = 0.05, seconds: int = 40
) -> list[object]:
    slo = ["--slo-ttft", ttft_s, "--slo-tbt", tbt_s]
    return ["--trace", trace, "--adapters", adapters, *slo, "--seconds", seconds]


@pytest.mark.slow
def test_the_command_says_nodes_placement_cost_and_what_others_would_need(
    plan: Plan, trace: Path, tmp_path: Path
) -> None:
    out, figure = tmp_path / "placement.json", tmp_path / "figure.png"
    done = plan(*_asked(trace), "--policies", "ours,slora-random", "--out", out, "--figure", figure)
    assert done.returncode == 0, done.stderr
    assert "derived profile" in done.stdout
    lines = [line.split() for line in done.stdout.splitlines()]
    needs = {words[0]: int(words[1]) for words in lines if words and words[0] in ("ours", "slora-random")}
    assert needs.keys() == {"ours", "slora-random"}
    assert lines[-1] == ["nodes", "needed:", str(needs["ours"])]
    answer = json.loads(out.read_text())
    assert answer["nodes"] == needs["ours"]
    assert len(answer["placement"]) == 12
    for placed in answer["placement"].values():
        assert sum(placed["nodes"].values()) == pytest.approx(1.0)
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert "100 %" in done.stderr


@pytest.mark.slow
def test_the_same_seed_answers_with_the_same_bytes(plan: Plan, trace: Path) -> None:
    asked = [
        *_asked(trace, seconds=10),
        "--policies",
        "ours,slora-random",
        "--popularity",
        "flash",
        "--ranks",
        "shifting",
    ]
    assert plan(*asked).stdout == _process(*asked).stdout != plan(*asked, "--seed", 1).stdout


@pytest.mark.slow
def test_the_busiest_part_is_simulated(plan: Plan, trace: Path) -> None:
    """Forty seconds at twenty a second."""
    assert "800 requests in 40 s" in plan(*_asked(trace), "--policies", "ours").stdout


@pytest.mark.slow
def test_a_file_of_adapters_is_placed_with_its_ranks_bytes_and_shares(
    plan: Plan, trace: Path, tmp_path: Path
) -> None:
    adapters, out = tmp_path / "adapters.csv", tmp_path / "placement.json"
    adapters.write_text("name,rank,bytes,share\nbusy,64,1000,9\nquiet,8,,1\n")
    done = plan(*_asked(trace, adapters), "--policies", "ours", "--out", out)
    assert done.returncode == 0, done.stderr
    placement = json.loads(out.read_text())["placement"]
    assert {name: (found["rank"], found["bytes"]) for name, found in placement.items()} == {
        "busy": (64, 1000),
        "quiet": (8, 8 * 5 * 2**20),
    }


@pytest.mark.slow
def test_more_nodes_than_may_be_tried_is_an_answer_of_its_own(trace: Path) -> None:
    done = _process(*_asked(trace, tbt_s=0.006), "--policies", "ours", "--most", 1)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].startswith("nodes needed: more than 1")


@pytest.mark.slow
def test_a_trial_that_was_given_up_shows_no_figures(plan: Plan, trace: Path) -> None:
    """One node for two hundred requests a second is soon behind; the few that it answered by then flatter it."""
    done = plan(*_asked(trace, ttft_s=0.1), "--speedup", 10, "--policies", "ours,slora-random", "--most", 1)
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith(("ours ", "slora-random "))]
    assert [row[1:] for row in rows] == [[">1", ">0.05", *["-"] * 7]] * 2
    assert "-: given up early, with too many requests late" in done.stdout.splitlines()


def test_the_help_says_what_node_hours_are(plan: Plan) -> None:
    assert "Node hours, the cost, are the nodes needed times the hours" in " ".join(plan("-h").stdout.split())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--trace", "missing.csv"], "--trace missing.csv: No such file or directory: give a CSV"),
        (["--trace", "/"], "--trace /: Is a directory: give a CSV"),
        (["--trace", sys.executable], f"--trace {sys.executable}: this is not such a text file: give a CSV"),
        (["--trace", __file__], f"--trace {__file__}: line 1 lacks the column TIMESTAMP: give a CSV"),
        (["--adapters", "missing.csv"], "--adapters missing.csv: No such file or directory: give how many"),
        (["--adapters", __file__], f"--adapters {__file__}: adapter 1 "),
        (["--adapters", "0"], "--adapters 0"),
        (["--adapters", "many"], "many"),
        (["--ranks", "odd"], "ranks='odd'"),
        (["--popularity", "odd"], "popularity='odd'"),
        (["--profile", "odd"], "'odd' is neither a file nor one of"),
        (["--policies", "odd"], "policy='odd'"),
        (["--slo-tbt", "0.001"], "loosen the SLO"),
        (["--slo-ttft", "0.0001"], "--slo-ttft 0.0001 --slo-tbt 0.05: no node meets this"),
        (
            ["--adapter-gib", "0.001"],
            "--adapter-gib 0.001: adapter 'adapter-4' of rank 128 takes 0.625 GiB and fits on no node: give at least",
        ),
        (["--slo-ttft", "-1"], "--slo-ttft -1"),
        (["--slo-ttft", "soon"], "--slo-ttft"),
        (["--seconds", "-5"], "--seconds -5: give 0 or more"),
        (["--seed", "-1"], "--seed -1: give 0 or more"),
        (["--seeds", "0"], "--seeds 0: give a number above 0"),
        (["--adapters", "99999999"], "--adapters 1e+08: give at most 100000"),
        (["--adapters", "9" * 5000], "--adapters 999999999999...: give at most 100000"),
        (["--adapter-gib", "1e300"], "--adapter-gib 1e+300: give at most"),
    ],
)
def test_bad_input_is_told_in_one_line(plan: Plan, trace: Path, options: list[str], says: str) -> None:
    done = plan(*_asked(trace), *options)
    assert done.returncode == 2
    assert done.stdout == ""
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("option", "name", "says"),
    [
        ("--out", "missing/placement.json", "make it"),
        ("--out", "", "a folder"),
        ("--figure", "missing/figure.png", "make it"),
        ("--figure", "figure.xyz", ".png"),
        ("--figure", "figure", ".png"),
    ],
)
def test_an_answer_that_cannot_be_written_is_told_before_the_work(
    plan: Plan, trace: Path, tmp_path: Path, option: str, name: str, says: str
) -> None:
    done = plan(*_asked(trace), option, tmp_path / name)
    assert done.returncode == 2
    assert f"{option} {tmp_path / name}: " in done.stderr
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1  # no progress either
    assert list(tmp_path.iterdir()) == []


def test_a_figure_without_matplotlib_is_told_before_the_work(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    figure = tmp_path / "figure.png"
    with pytest.raises(SystemExit):
        main([str(each) for each in ("plan", *_asked(trace), "--figure", figure)])
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines() == [
        f"python -m scheduler.sim: --figure {figure}: this needs matplotlib: pip install matplotlib, or leave "
        "--figure out"
    ]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_the_table_stands_even_if_a_file_cannot_be_written(plan: Plan, trace: Path) -> None:
    done = plan(*_asked(trace), "--policies", "ours", "--out", "/dev/full")
    assert done.returncode == 2
    assert done.stdout.splitlines()[-1].startswith("nodes needed: ")
    assert "--out /dev/full: No space left" in done.stderr.splitlines()[-1]


def test_what_must_be_asked_is_asked_for_in_one_line(plan: Plan) -> None:
    done = plan("--adapters", 5)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "--trace" in done.stderr


def test_a_list_that_says_it_all_leaves_nothing_to_other_options(
    plan: Plan, trace: Path, tmp_path: Path
) -> None:
    adapters = tmp_path / "adapters.csv"
    adapters.write_text("name,rank,bytes,share\nbusy,64,1000,9\nquiet,8,,1\n")
    for option in (["--ranks", "equal"], ["--popularity", "power"]):
        done = plan(*_asked(trace, adapters), *option)
        assert done.returncode == 2
        assert "leave" in done.stderr
