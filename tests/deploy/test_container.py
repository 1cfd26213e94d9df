"""The container file, which no test can build: what it copies exists, and what it starts is there."""

import re
import shlex
import tomllib
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

from engine.config.command_line import serve_config

ROOT = Path(__file__).parents[2]
TEXT = re.sub(r"\\\n\s*", "", (ROOT / "deploy" / "Dockerfile").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
KEYWORDS = {
    "ARG",
    "FROM",
    "ENV",
    "RUN",
    "WORKDIR",
    "COPY",
    "EXPOSE",
    "HEALTHCHECK",
    "ENTRYPOINT",
    "CMD",
    "USER",
}


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage: what it begins from, and its instructions as pairs of keyword and rest."""

    name: str
    base: str
    steps: tuple[tuple[str, str], ...]

    def told(self, keyword: str) -> list[str]:
        """What follows one keyword."""
        return [rest for each, rest in self.steps if each == keyword]


def stages() -> dict[str, Stage]:
    """The stages by name."""
    lines = [line for line in TEXT.splitlines() if line.strip() and not line.startswith("#")]
    pairs = [tuple(line.split(maxsplit=1)) for line in lines]
    assert {keyword for keyword, _ in pairs} <= KEYWORDS
    starts = [number for number, (keyword, _) in enumerate(pairs) if keyword == "FROM"]
    found: dict[str, Stage] = {}
    for start, end in zip(starts, [*starts[1:], len(pairs)], strict=True):
        base, name = re.fullmatch(r"(\S+) AS (\S+)", pairs[start][1]).groups()  # pyright: ignore[reportOptionalMemberAccess]
        found[name] = Stage(name, base, tuple((str(key), str(rest)) for key, rest in pairs[start + 1 : end]))
    return found


STAGES = stages()
TARGETS = ("cpu", "cuda")


def lineage(name: str) -> list[Stage]:
    """A stage and those that it begins from, itself first."""
    return [STAGES[name], *lineage(STAGES[name].base)] if name in STAGES else []


def last(name: str, keyword: str) -> str:
    """What a stage's image has of a keyword: its own last, or that of the stage it begins from."""
    return next(stage.told(keyword)[-1] for stage in lineage(name) if stage.told(keyword))


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_copied_is_there_and_reaches_the_builder(stage: str) -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for written in STAGES[stage].told("COPY"):
        flags = [word for word in written.split() if word.startswith("--")]
        *sources, _ = (word for word in written.split() if not word.startswith("--"))
        if flags:
            assert flags[0].removeprefix("--from=") in STAGES
            continue
        for source in sources:
            assert (ROOT / source).exists()
            assert any(fnmatch(source, pattern) for pattern in kept)


@pytest.mark.parametrize("target", TARGETS)
def test_every_package_of_the_project_is_installed_with_the_projects_torch(target: str) -> None:
    installed = STAGES[f"installed-{target}"]
    copied = {word for written in installed.told("COPY") for word in written.split()}
    assert set(PROJECT["tool"]["importlinter"]["root_packages"]) <= copied
    (pinned,) = (each for each in PROJECT["project"]["dependencies"] if each.startswith("torch"))
    pips = [written for written in installed.told("RUN") if "pip install" in written]
    assert pips
    assert all(pinned in shlex.split(written) for written in pips)
    groups = re.findall(r"\.\[([\w,]+)\]", " ".join(pips))
    extras = {extra for group in groups for extra in group.split(",")}
    assert extras <= PROJECT["project"]["optional-dependencies"].keys()


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_built_in_the_image_that_is_shipped(target: str) -> None:
    run = [written for stage in lineage(target) for written in stage.told("RUN")]
    assert not any(word in written for written in run for word in ("pip", "git", "build-essential", "nvcc"))
    assert not any("gcc" in written for written in run) or target == "cuda"
    (taken,) = (written for stage in lineage(target) for written in stage.told("COPY"))
    assert taken.startswith(f"--from=installed-{target} ")


@pytest.mark.parametrize("target", TARGETS)
def test_it_runs_as_nobody_in_particular_and_under_the_manifests_user(target: str) -> None:
    assert last(target, "USER") == "10001:10001"


@pytest.mark.parametrize("target", TARGETS)
def test_what_it_starts_is_a_server_that_its_health_check_finds(target: str) -> None:
    *start, module = re.findall(r'"([^"]+)"', last(target, "ENTRYPOINT"))
    assert start == ["python", "-m"]
    assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file()
    config = serve_config(re.findall(r'"([^"]+)"', last(target, "CMD")), {})
    assert f"http://127.0.0.1:{config.port}/health" in last(target, "HEALTHCHECK")
    assert last(target, "EXPOSE") == str(config.port)


def test_its_python_is_one_that_the_project_runs_on() -> None:
    version = re.search(r"ARG PYTHON=(\d+)\.(\d+)", TEXT)
    assert version is not None
    least = re.findall(r"\d+", PROJECT["project"]["requires-python"])
    assert [int(each) for each in version.groups()] >= [int(each) for each in least]
