"""The fuzzer: every target holds on a few cases, and what fails is kept, told and can be tried again."""

import json
import os
import random
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import FunctionType

import pytest

from scripts.fuzz import __main__ as command
from scripts.fuzz import campaign
from scripts.fuzz.campaign import run_workers
from scripts.fuzz.case import Case, Finding, Target
from scripts.fuzz.guided import Inputs, try_guided
from scripts.fuzz.harnesses.readers import requests
from scripts.fuzz.harnesses.sound_bodies import SOUND
from scripts.fuzz.mutators import spoilt_json, spoilt_safetensors
from scripts.fuzz.targets import TARGETS, open_target
from scripts.fuzz.trial import Outcome, Plan, try_cases


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_a_few_cases_of_every_target_are_served_or_refused(name: str, tmp_path: Path) -> None:
    target = open_target(name)
    try:
        outcome = try_cases(target, Plan(name, 7, tmp_path, 600.0, cases=20), lambda so_far: None)
    finally:
        target.close()
    why = [path.with_suffix(".txt").read_text() for path in outcome.findings]
    assert (outcome.cases, why) == (20, [])


class Fragile:
    """A target that fails in several ways, by the case's first byte, and is told of all that it tried."""

    def __init__(self) -> None:
        self.seen: list[bytes] = []

    def whole(self) -> list[Case]:
        return [Case("x", b"c"), Case("y", b"whole")]

    def draw(self, chance: random.Random) -> Case:
        return Case("x", b"abc"[chance.randrange(3) :][:1])

    def run(self, case: Case) -> str:
        self.seen.append(case.content)
        if case.content == b"a":
            raise Finding("it said a")
        if case.content == b"b":
            raise KeyError("b")
        return "taken"

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass


def test_what_fails_is_kept_with_the_reason_and_counted(tmp_path: Path) -> None:
    told: list[Outcome] = []
    outcome = try_cases(Fragile(), Plan("fragile", 1, tmp_path, 60.0, cases=15), told.append)
    assert outcome.cases == 15
    assert set(outcome.counts) == {"taken", "finding", "finding (KeyError)"}
    kept = {Case.decoded(path.read_bytes()).content: path for path in outcome.findings}
    assert set(kept) == {b"a", b"b"}
    assert "it said a" in kept[b"a"].with_suffix(".txt").read_text()
    assert told[-1] is outcome
    assert not list(tmp_path.glob("current-*"))


def test_a_seed_tells_all_cases(tmp_path: Path) -> None:
    tried: list[list[bytes]] = []
    for _ in range(2):
        target = Fragile()
        try_cases(target, Plan("fragile", 3, tmp_path, 60.0, cases=10), lambda so_far: None)
        tried.append(target.seen)
    assert tried[0] == tried[1]


def test_a_case_is_the_same_after_its_file(tmp_path: Path) -> None:
    case = Case("adapter_config.json", b"\x00\n\xff")
    assert Case.decoded(case.encoded()) == case


def test_spoilt_values_differ_from_the_whole_one() -> None:
    chance, whole = random.Random(1), {"a": [1, {"b": "c"}], "d": None}
    spoilt = {spoilt_json(chance, whole, ("e",)) for _ in range(50)}
    assert len(spoilt) > 40


def test_spoilt_tensors_begin_with_some_length() -> None:
    header = b'{"t":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    content = len(header).to_bytes(8, "little") + header + bytes(4)
    spoilt = {spoilt_safetensors(random.Random(seed), content) for seed in range(50)}
    assert len(spoilt) > 40


def test_bytes_of_atheris_are_cases_of_every_head_and_begin_with_the_whole_ones(tmp_path: Path) -> None:
    inputs, target = Inputs(Fragile()), Fragile()
    inputs.write(tmp_path)
    assert [inputs.case(path.read_bytes()) for path in sorted(tmp_path.iterdir())] == target.whole()
    assert inputs.case(b"") == Case("x", b"")
    assert inputs.case(b"\x03a") == Case("y", b"a")
    spoilt = [inputs.spoilt(b'\x01{"a": 1}', random.Random(seed)) for seed in range(20)]
    assert all(content is not None and content[0] == 1 for content in spoilt)
    assert inputs.spoilt(b"\x01{", random.Random(1)) is None


@pytest.mark.parametrize("name", ["adapters", "messages", "requests", "tokenizers"])
def test_no_bytes_of_atheris_raise_what_is_not_foreseen(name: str, tmp_path: Path) -> None:
    target = open_target(name)
    try:
        _try_bytes(target, tmp_path)
    finally:
        target.close()


def _try_bytes(target: Target, folder: Path) -> None:
    inputs, chance = Inputs(target), random.Random(1)
    inputs.write(folder)
    assert {target.run(case) for case in target.whole()} == {"taken"}
    for _ in range(20):
        target.run(inputs.case(chance.randbytes(chance.randrange(20))))
        whole = chance.choice([each.read_bytes() for each in folder.iterdir()])
        target.run(inputs.case(inputs.spoilt(whole, chance) or b""))


@pytest.mark.parametrize("path", SOUND)
def test_sound_bodies_are_taken(path: str) -> None:
    target, chance = requests(), random.Random(1)
    for _ in range(100):
        body = SOUND[path](chance, True)
        assert (target.run(Case(path, json.dumps(body).encode())), body) == ("taken", body)


class FakeAtheris:
    """Draws what the mutator makes of one input, without an end, as atheris does."""

    def __init__(self) -> None:
        self.instrumented: list[str] = []

    def instrument_func(self, function: FunctionType) -> None:
        self.instrumented.append(function.__module__)

    def Setup(  # noqa: N802 - atheris' name
        self, arguments: list[str], attempt: Callable[[bytes], None], custom_mutator: Callable[..., bytes]
    ) -> None:
        self._attempt, self._mutate = attempt, custom_mutator

    def Fuzz(self) -> None:  # noqa: N802 - atheris' name
        for seed in count():
            self._attempt(self._mutate(b'\x01{"a": 1}', 100, seed))

    def Mutate(self, content: bytes, most_bytes: int) -> bytes:  # noqa: N802 - atheris' name
        return content[:-1]


def test_cases_of_atheris_are_tried_counted_and_kept_until_the_plan_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    atheris, target, told = FakeAtheris(), Fragile(), list[Outcome]()
    monkeypatch.setitem(sys.modules, "atheris", atheris)
    monkeypatch.setattr(os, "_exit", sys.exit)
    plan = Plan("fragile", 1, tmp_path, 60.0, cases=30, corpus=tmp_path / "corpus")
    with pytest.raises(SystemExit) as ended:
        try_guided(target, plan, told.append)
    assert ended.value.code == 0
    assert told[-1].counts == {"taken": 30}
    assert target.seen[:2] == [b"c", b"whole"]
    assert len(set(target.seen)) > 5
    watched = {name.partition(".")[0] for name in atheris.instrumented}
    assert watched == {"engine", "lora", "model", "transport", "scheduler"}


def test_without_atheris_its_cases_are_refused_with_how_to_get_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "atheris", None)
    with pytest.raises(SystemExit) as ended:
        command.main(["messages", "--corpus", str(tmp_path)])
    assert ended.value.code == 2
    assert "pip install 'loraserve[fuzz]'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_counts_in_a_row_and_tries_a_kept_case_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, folder = tmp_path / "rows.jsonl", tmp_path / "findings"
    given = ["adapters", "--cases", "5", "--workers", "2", "--seed", "4"]
    assert command.main([*given, "--results", str(rows), "--findings", str(folder)]) == 0
    assert '"target": "adapters", "seed": 4, "drawn_by": "chance", "workers": 2' in rows.read_text()
    assert '"cases": 10' in rows.read_text()
    case = tmp_path / "one.case"
    case.write_bytes(Case("adapter_config.json", b"{").encoded())
    assert command.main(["adapters", "--replay", str(case)]) == 0
    assert "refused" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong",
    [
        ["--hours", "0"],
        ["--hours", "nan"],
        ["--workers", "0"],
        ["--cases", "0"],
        ["--replay", "/none"],
        ["--seed", "x"],
    ],
)
def test_wrong_options_are_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["adapters", *wrong])
    assert ended.value.code == 2
    assert wrong[0] in capsys.readouterr().err


@pytest.mark.slow
def test_a_worker_that_dies_leaves_its_case_and_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(campaign, "_work", _die)
    monkeypatch.setattr(campaign, "MOST_FINDINGS", 2)
    outcome = run_workers(Plan("adapters", 1, tmp_path, 60.0), 1, lambda so_far: None)
    assert outcome.counts["finding (crash or hang)"] >= 1
    assert Case.decoded(outcome.findings[0].read_bytes()) == Case("x", b"last")


def _die(plan: Plan, pipe: object) -> None:
    (plan.folder / f"current-{os.getpid()}").write_bytes(Case("x", b"last").encoded())
    os.abort()
