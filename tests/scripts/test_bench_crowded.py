"""A crowd of adapters is drawn as it was asked for, and what its clients saw is told by tier."""

import json
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from scripts.bench import crowded
from scripts.bench.crowded import Crowd, parse, plan, rows, runs, table, write_crowd
from scripts.bench.serving.client import RequestEnd, RequestOutcome
from scripts.bench.serving.traffic import PlannedRequest

CROWD = Crowd(
    Path("adapters"), ("reverse-0000", "upper-0001", "sort-0002"), ("mask-0003", "rot13-0004"), 3000, 900
)


def outcome(tier: str, ttft_s: float, tokens: int) -> RequestOutcome:
    planned = PlannedRequest(0.0, "reverse-0000", 1, 1)
    return RequestOutcome(planned, RequestEnd.OK, 0.0, 0.0, (ttft_s,), tokens, tier=tier)


def test_only_adapters_that_are_asked_for_have_files_of_their_own(tmp_path: Path) -> None:
    crowd = write_crowd(tmp_path, registered=9, hot=3, cold=2, rng=Random(0))
    folders = sorted(tmp_path.iterdir())
    files = [folder / "adapter_model.safetensors" for folder in folders]
    assert (len(folders), len({file.stat().st_ino for file in files})) == (9, 5)
    assert {folder.name for folder in folders} >= {*crowd.hot, *crowd.cold}
    assert (len(crowd.hot), len(crowd.cold)) == (3, 2)
    hot = sum((tmp_path / name / "adapter_model.safetensors").stat().st_size for name in crowd.hot)
    assert hot / 2 < crowd.nbytes < 2 * hot


@pytest.mark.parametrize("arguments", [[], ["--rate", "5"]])
def test_each_cold_adapter_is_asked_for_once_among_the_hot_ones(arguments: list[str]) -> None:
    planned = plan(parse(["--requests", "40", *arguments]), CROWD)
    asked = [each.model for each in planned]
    assert [asked.count(name) for name in CROWD.cold] == [1, 1]
    assert set(asked) == {*CROWD.hot, *CROWD.cold}
    assert (planned[-1].at_s > 0) == bool(arguments)


def test_memory_is_for_as_many_of_the_hot_ones_as_asked_and_for_all_and_the_cold_ones() -> None:
    given = {run: int(options[1]) for run, options in runs(CROWD, 1, Path("cache")).items()}
    assert given == {"fits": 5250, "host": 1050, "disk": 1050}
    one = replace(CROWD, largest=2000)
    assert runs(one, 1, Path("cache"))["host"][1] == "2100", "the largest must fit"


def test_first_tokens_are_told_by_tier_and_throughput_beside_the_run_that_fits() -> None:
    outcomes = [outcome("device", 0.1, 30), outcome("device", 0.3, 30), outcome("disk", 0.5, 20)]
    found = [*rows("fits", outcomes[:2], 1.0), *rows("disk", outcomes, 4.0)]
    told = {(row["run"], row["tier"]): (row["requests"], row["ttft_p50_ms"]) for row in found}
    assert told["disk", "device"] == (2, pytest.approx(200))
    assert told["disk", "disk"] == (1, pytest.approx(500))
    assert told["disk", "(all)"] == (3, pytest.approx(300))
    assert ("disk", "host") not in told
    last = table([*found, {"run": "disk", "tier": "counts", "evictions": 3.0}]).splitlines()
    assert last[-2].split()[-2:] == ["20.0", "33.3"]  # 80 tokens in 4 s, where 60 took 1 s
    assert "evictions 3.0" in last[-1]


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["--registered", "10", "--hot", "9", "--requests", "100"], "--registered 10: give at least 11"),
        (["--hot", "5", "--memory-for", "6"], "--memory-for 6: give at most --hot 5"),
    ],
)
def test_a_crowd_that_cannot_be_is_refused(
    arguments: list[str], remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(arguments)
    assert remedy in capsys.readouterr().err


@pytest.mark.slow
def test_a_small_crowd_is_served_from_every_tier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "rows.jsonl"
    small = [
        "--registered",
        "30",
        "--hot",
        "8",
        "--memory-for",
        "2",
        "--requests",
        "40",
        "--cold-share",
        "0.1",
    ]
    monkeypatch.setattr(
        "sys.argv", ["crowded", *small, "--clients", "2", "--folder", str(tmp_path), "--out", str(out)]
    )
    assert crowded.main() == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    served = {(row["run"], row["tier"]) for row in found if row.get("ok")}
    assert served >= {("fits", "device"), ("fits", "folder"), ("host", "host"), ("disk", "disk")}
    assert {row["run"]: row["evictions"] > 0 for row in found if row["tier"] == "counts"} == {
        "fits": False, "host": True, "disk": True,
    }  # fmt: skip
    assert not list(tmp_path.glob("loraserve-crowd-*")), "what was written is removed"
