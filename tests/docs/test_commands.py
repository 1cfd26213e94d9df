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
WITHOUT_HELP = (
    "scripts/test",
    "scripts/check",
    "scripts/setup",
    "scripts/sanitize",
    "examples/",
    "engine.config",
)
SUBCOMMANDS = {"scheduler.sim": 1, "scripts.profile_node": 1}
"""Modules whose first arguments choose what they do, and how many of them do."""

FOREIGN = frozenset({"--help"})
Words = tuple[str, ...]

_OPTION = re.compile(r"(?<![\w-])(--[a-z][\w-]*\w(?![\w-])|-[a-z](?=[ =]))")
_COMMAND = re.compile(
    r"(?:^|\s)((?:python -m [\w.]+|python [\w/]+\.py|scripts/[\w-]+(?![\w./])|examples/[\w-]+\.sh).*)"
)


@dataclass(frozen=True, slots=True)
class Command:
    """A command as a page shows it: the script or module, the words that choose its help, and its options."""

    page: str
    program: str
    words: Words
    options: Words

    @property
    def has_help(self) -> bool:
        """Whether it can be asked what it knows."""
        return not self.program.startswith(WITHOUT_HELP)

    @property
    def asked(self) -> list[Words]:
        """What to ask for help: itself, or every module that a NAME at its end may stand for."""
        if not self.program.endswith(".NAME"):
            return [(self.program, *self.words)]
        folder = self.program.removesuffix(".NAME")
        return [
            (f"{folder}.{path.stem}",) for path in sorted((ROOT / folder.replace(".", "/")).glob("[!_]*.py"))
        ]


def commands(page: Page) -> Iterator[Command]:
    """Every command of a page's code, its continued lines joined and its comment left out."""
    for code in page.code:
        for line in re.sub(r"\\\n\s*", "", code).splitlines():
            found = _COMMAND.search(line.split(" #")[0])
            if found:
                yield _command(page, found[1])


def _command(page: Page, line: str) -> Command:
    first, *rest = line.removeprefix("python ").removeprefix("-m ").split()
    program = MODULE_OF.get(first, first)
    chosen = tuple(rest[: SUBCOMMANDS.get(program, 0)])
    return Command(page.name, program, chosen, tuple(_OPTION.findall(" ".join(rest) + " ")))


PAGES = current_pages()
COMMANDS = [command for page in PAGES for command in commands(page)]


@pytest.fixture(scope="module")
def helps() -> dict[Words, str]:
    """The help of every command that has one."""
    asked = {words for command in COMMANDS if command.has_help for words in command.asked}
    answer = subprocess.run(
        [sys.executable, "-m", "tests.docs.command_help"],
        input=json.dumps(sorted(asked)),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=True,
    )
    return {tuple(words.split()): text for words, text in json.loads(answer.stdout).items()}


def options_of(help_text: str) -> frozenset[str]:
    """The options that a help names; none where what was printed is no help."""
    return frozenset(_OPTION.findall(help_text)) if help_text.startswith("usage:") else frozenset()


def unknown(command: Command, helps: dict[Words, str]) -> list[str]:
    """What is wrong with a command: that it gives no help, or the options that it does not know."""
    known = [options for words in command.asked if (options := options_of(helps[words]))]
    if not known:
        return [f"{command.page}: {command.program}: {helps.get(command.asked[0], '')[-200:]}"]
    missing = min((sorted({*command.options} - options - FOREIGN) for options in known), key=len)
    return [f"{command.page}: {command.program} {option}" for option in missing]


@pytest.mark.slow
def test_every_command_is_there_and_knows_its_options(helps: dict[Words, str]) -> None:
    assert len(COMMANDS) > 20
    assert [fault for command in COMMANDS if command.has_help for fault in unknown(command, helps)] == []


@pytest.mark.slow
def test_every_option_that_prose_names_is_known_to_some_command(helps: dict[Words, str]) -> None:
    known = FOREIGN.union(*(options_of(text) for text in helps.values()))
    named = [(page.name, option) for page in PAGES for span in page.spans for option in _OPTION.findall(span)]
    assert [(page, option) for page, option in named if option not in known] == []


def test_every_script_without_a_help_is_there_and_can_be_run() -> None:
    shown = {each.program for each in COMMANDS if not each.has_help and "/" in each.program}
    started = {name for name in shown if not name.endswith(".py")}
    assert {name for name in shown if not (ROOT / name).is_file()} == set()
    assert {name for name in started if not os.access(ROOT / name, os.X_OK)} == set()


def test_every_extra_that_is_set_up_is_in_pyproject() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    blocks = [block for page in PAGES for block in page.blocks]
    shown = [words for block in blocks for words in re.findall(r"scripts/setup((?: \w+)*)", block)]
    assert {extra for words in shown for extra in words.split()} - set(extras) == set()


def test_a_command_is_read_with_its_continued_lines() -> None:
    block = "    scripts/serve --port 0 \\\n        --lora a=b  # --not-this\n    python -m scheduler.sim plan [-h]\n"
    first, second = commands(Page(ROOT / "x.md", f"`scripts/not_this.py`\n\n{block}"))
    assert first == Command("x.md", "engine.serve", (), ("--port", "--lora"))
    assert second.asked == [("scheduler.sim", "plan")]


def test_a_command_that_is_gone_and_an_option_that_is_unknown_are_found() -> None:
    helps = {("a.b",): "usage: a.b [--one]", ("a.gone",): "ImportError: No module named a.gone"}
    assert unknown(Command("p", "a.b", (), ("--one", "--two")), helps) == ["p: a.b --two"]
    assert unknown(Command("p", "a.gone", (), ()), helps) == [
        "p: a.gone: ImportError: No module named a.gone"
    ]
