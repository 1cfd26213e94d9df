"""The commands that the pages show can be run: each exists, and knows every option that it is given there."""

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.docs.pages import ROOT, Page, current_pages

MODULE_OF = {"scripts/serve": "engine.serve", "scripts/batch": "engine.batch"}
WITHOUT_HELP = ("scripts/test", "scripts/check", "scripts/setup", "examples/")
SUBCOMMANDS = {"scheduler.sim": 1}
"""Modules whose first arguments choose what they do, and how many of them do."""

_OPTION = re.compile(r"(?<![\w-])(--[a-z][\w-]*|-[a-z](?=[ =]))")
_COMMAND = re.compile(
    r"(?:^|\s)((?:python -m [\w.]+|python [\w/]+\.py|scripts/[\w-]+(?![\w./])|examples/[\w-]+\.sh).*)"
)
_FOREIGN = frozenset({"--help"})


@dataclass(frozen=True, slots=True)
class Command:
    """A command as a page shows it: the script or module, what chooses its help, and its options."""

    page: str
    program: str
    words: tuple[str, ...]
    options: tuple[str, ...]

    @property
    def asked(self) -> tuple[str, ...]:
        """What to ask for help."""
        return (self.program, *self.words)


def commands(page: Page) -> Iterator[Command]:
    """Every command of a page's code, its continued lines joined and its comment left out."""
    for code in page.code:
        for line in re.sub(r"\\\n\s*", "", code).splitlines():
            found = _COMMAND.search(line.split(" #")[0])
            if found:
                yield _command(page, found[1])


def _command(page: Page, line: str) -> Command:
    words = line.removeprefix("python ").removeprefix("-m ").split()
    program = MODULE_OF.get(words[0], words[0])
    chosen = tuple(words[1 : 1 + SUBCOMMANDS.get(program, 0)])
    return Command(page.name, program, chosen, tuple(_OPTION.findall(line.removeprefix("python -m"))))


def _has_help(command: Command) -> bool:
    return not command.program.startswith(WITHOUT_HELP)


def _is_placeholder(command: Command) -> bool:
    """Whether a part of the program's name stands for any of several, as NAME does."""
    return any(part.isupper() for part in command.program.split("."))


PAGES = current_pages()
COMMANDS = [command for page in PAGES for command in commands(page)]


@pytest.fixture(scope="module")
def helps() -> dict[tuple[str, ...], str]:
    """The help of every command that has one."""
    asked = sorted(
        {command.asked for command in COMMANDS if _has_help(command) and not _is_placeholder(command)}
    )
    asked = sorted({*asked, ("engine.serve",)})
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    answer = subprocess.run(
        [sys.executable, "-m", "tests.docs.helps"],
        input=json.dumps(asked), cwd=ROOT, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return {tuple(words.split()): text for words, text in json.loads(answer.stdout).items()}


@pytest.mark.slow
def test_every_command_is_there_and_knows_its_options(helps: dict[tuple[str, ...], str]) -> None:
    faults: list[str] = []
    for command in COMMANDS:
        if not _has_help(command) or _is_placeholder(command):
            continue
        text = helps[command.asked]
        if not text.startswith("usage:"):
            faults.append(f"{command.page}: {' '.join(command.asked)}: {text[-200:]}")
        known = {*_OPTION.findall(text), *_FOREIGN}
        faults += [f"{command.page}: {command.program} {o}" for o in command.options if o not in known]
    assert faults == []


@pytest.mark.slow
def test_every_option_that_prose_names_is_known_to_some_command(helps: dict[tuple[str, ...], str]) -> None:
    known = {option for text in helps.values() for option in _OPTION.findall(text)} | _FOREIGN
    named = [(page.name, option) for page in PAGES for span in page.spans for option in _OPTION.findall(span)]
    assert [(page, option) for page, option in named if option not in known] == []


def test_every_script_without_a_help_is_there_and_runs() -> None:
    shown = {command.program for command in COMMANDS if not _has_help(command)}
    assert {name for name in shown if not (ROOT / name).is_file()} == set()
    assert {
        name for name in shown if name.startswith("scripts/") and not os.access(ROOT / name, os.X_OK)
    } == set()


def test_every_extra_that_is_set_up_is_in_pyproject() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    shown = [
        line for page in PAGES for code in page.code for line in re.findall(r"scripts/setup ([\w ]+)", code)
    ]
    assert {extra for line in shown for extra in line.split()} - set(extras) == set()


def test_a_command_is_read_with_its_continued_lines() -> None:
    block = "    scripts/serve --port 0 \\\n        --lora a=b  # --not-this\n    python -m scheduler.sim plan [-h]\n"
    first, second = commands(Page(ROOT / "x.md", f"`scripts/not_this.py`\n\n{block}"))
    assert (first.asked, first.options) == (("engine.serve",), ("--port", "--lora"))
    assert second.asked == ("scheduler.sim", "plan")
