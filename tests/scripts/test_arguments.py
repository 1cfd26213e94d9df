"""Commands of scripts/ end in one line, without a traceback, for a value or a file that they cannot use."""

import argparse
import runpy
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import pytest

WRONG = {
    "scripts.bench.bodies --rounds 0": "give a number from 1",
    "scripts.bench.engine --models x --baselines none --quiet-wait 0": "make it by python -m",
    "scripts.bench.engine --baselines nope": "'nope' is none of",
    "scripts.bench.engine --kinds zz": "'zz' is none of",
    "scripts.bench.engine --batches 1,,2": "'' is no whole number",
    "scripts.bench.engine --rounds 0": "give a number from 1",
    "scripts.bench.engine --timeout nan": "give seconds",
    "scripts.bench.engine.draw /nowhere --out x.png": "/nowhere",
    "scripts.bench.tiers.draw /dev/null --out x.png": "has no rows",
    "scripts.bench.make_models --sizes zz": "'zz' is none of",
    "scripts.bench.make_models --adapters -1": "give a number from 1",
    "scripts.bench.host --sequences 0": "give a number from 1",
    "scripts.bench.host --steps -5": "give a number from 1",
    "scripts.bench.layers --folder /nowhere": "there is no /nowhere",
    "scripts.bench.activated --rounds 0": "give a number from 1",
    "scripts.bench.publish --rounds 0": "give a number from 1",
    "scripts.bench.serving --clients -1": "give a number from 1",
    "scripts.bench.serving --prompt-tokens 5-1": "give LOW-HIGH",
    "scripts.bench.serving --prompt-tokens x": "no whole number",
    "scripts.bench.simulator --traces /nowhere --out rows": "/nowhere",
    "scripts.bench.tiers --folder /nowhere": "there is no /nowhere",
    "scripts.bench.transport --rounds 0": "give a number from 1",
    "scripts.figures.matrix --draw --out .": "has no rows",
    "scripts.figures.matrix --traces /nowhere --out .": "/nowhere",
    "scripts.profile_node fit --rows /nowhere --profile x": "/nowhere",
    "scripts.reading --out /nowhere/x": "/nowhere/x",
}


@pytest.mark.parametrize(("command", "told"), WRONG.items(), ids=WRONG.keys())
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of a module that another test has imported
def test_what_a_command_cannot_use_is_told_in_one_line(
    command: str,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module, *arguments = command.split()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    said = f"{capsys.readouterr().err}\n{ended.value.code}"
    assert ended.value.code not in (0, None)
    last = next(line for line in reversed(said.splitlines()) if told in line)
    assert "Traceback" not in said
    assert len(last) < 400


OPTIONS_OF_OTHERS = ("openapi.py",)  # hands its arguments to schemathesis
PROGRAMS = sorted(
    str(path.with_suffix("")).replace("/", ".").removesuffix(".__main__")
    for path in Path("scripts").rglob("*.py")
    if 'if __name__ == "__main__"' in path.read_text() and "programs" not in path.parts
    if path.name not in OPTIONS_OF_OTHERS
)
SENSELESS = ("nan", "inf", "-inf", "-1", "1e999", "-1e-9", "x", "")
MAY_BE_INFINITE = {"--rate"}


def takes_a_real_number(option: argparse.Action) -> bool:
    """Tell whether the option's type reads parts of a unit."""
    try:
        return callable(option.type) and isinstance(option.type("0.5"), float)
    except (argparse.ArgumentTypeError, ValueError):
        return False


def accepts(option: argparse.Action, text: str) -> bool:
    assert callable(option.type)
    try:
        option.type(text)
    except (argparse.ArgumentTypeError, ValueError):
        return False
    return True


def options_of(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """List a parser's options, and those of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
                yield from options_of(command)  # pyright: ignore[reportUnknownArgumentType]


@pytest.mark.parametrize("module", PROGRAMS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_no_option_takes_a_number_that_makes_no_sense(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parsers: list[argparse.ArgumentParser] = []

    def parse_args(parser: argparse.ArgumentParser, *arguments: object, **more: object) -> NoReturn:
        parsers.append(parser)
        raise SystemExit(0)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", [module])
    with suppress(SystemExit):
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert parsers
    numbers = [option for option in options_of(parsers[0]) if takes_a_real_number(option)]
    for option in numbers:
        allowed = {"inf", "1e999"} if MAY_BE_INFINITE & {*option.option_strings} else set[str]()
        assert {text for text in SENSELESS if accepts(option, text)} <= allowed, option.option_strings
