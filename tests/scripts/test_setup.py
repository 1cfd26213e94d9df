"""scripts/setup, and the remedies that name it: each names an extra that there is."""

import re
import subprocess
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
FLOORS = ("engine", "scheduler", "model", "lora", "transport")


def extras() -> set[str]:
    return set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


def test_an_extra_that_is_not_there_is_refused_before_anything_is_installed() -> None:
    ended = subprocess.run(
        [ROOT / "scripts" / "setup", "dev", "nonsense"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.startswith("scripts/setup: there is no extra 'nonsense'")
    assert set(ended.stderr.rpartition("any of ")[2].split()) == extras()


def test_remedies_name_extras_that_are_there_and_no_package_that_is_nowhere() -> None:
    sources = [path.read_text() for floor in FLOORS for path in (ROOT / floor).rglob("*.py")]
    named = {extra for source in sources for extra in re.findall(r"scripts/setup (\w+)", source)}
    assert named == {"cuda", "hub", "otel", "ray", "ucx"}
    assert named <= extras()
    assert not [source for source in sources if "pip install 'loraserve" in source]
