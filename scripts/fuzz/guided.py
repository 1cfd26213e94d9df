"""Try cases that atheris draws: it watches which branches of our readers an input takes, and looks for new ones.

Only functions of our own packages are watched, once all is imported: watching torch's takes minutes.
"""

import gc
import importlib
import os
import random
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

from scripts.fuzz.case import Case, Target
from scripts.fuzz.mutators import file_spoiler
from scripts.fuzz.trial import HANG_S, Outcome, Plan, Trial

_WATCHED = ("engine.", "lora.", "model.", "transport.", "scheduler.")


class AtherisMissing(Exception):
    """The optional library is not there; the message says how to get it."""

    def __init__(self) -> None:
        super().__init__("atheris is not installed: pip install 'loraserve[fuzz]', on CPython 3.11 to 3.13")


def load_atheris() -> Any:
    """Return the optional library. Raises AtherisMissing."""
    try:
        return importlib.import_module("atheris")
    except ImportError:
        raise AtherisMissing from None


class Inputs:
    """The cases of a target as bytes: the first byte chooses the head, the rest is the content."""

    def __init__(self, target: Target) -> None:
        """Take the heads of the target's whole cases."""
        self._whole = target.whole()
        self._heads = list(dict.fromkeys(case.head for case in self._whole))

    def case(self, content: bytes) -> Case:
        """Return the case that the bytes mean."""
        return Case(self._heads[content[0] % len(self._heads) if content else 0], content[1:])

    def write(self, folder: Path) -> None:
        """Write the whole cases to a folder, to begin with."""
        folder.mkdir(parents=True, exist_ok=True)
        for number, case in enumerate(self._whole):
            first = bytes([self._heads.index(case.head)])
            (folder / f"whole-{number}").write_bytes(first + case.content)

    def spoilt(self, content: bytes, chance: random.Random) -> bytes | None:
        """Spoil a case by its kind of file; None if it is too spoilt for that already."""
        case = self.case(content)
        try:
            return content[:1] + file_spoiler(case.head, case.content)(chance)
        except Exception:  # noqa: BLE001 - whatever it stumbles over, atheris goes on by itself
            return None


def try_guided(target: Target, plan: Plan, report: Callable[[Outcome], object]) -> None:
    """Try cases that atheris draws, and end this process: atheris never returns. Raises AtherisMissing."""
    assert plan.corpus is not None, "it is what atheris draws from"
    atheris, inputs, trial = load_atheris(), Inputs(target), Trial(target, plan, report)
    inputs.write(plan.corpus)
    for case in target.whole():  # libraries import much when it is first needed
        trial.take(case)
    for function in [each for each in gc.get_objects() if type(each) is FunctionType]:
        if str(function.__module__).startswith(_WATCHED):
            atheris.instrument_func(function)

    def attempt(content: bytes) -> None:
        trial.take(inputs.case(content))
        if not trial.goes_on:
            trial.end()
            target.close()
            os._exit(0)

    def mutate(content: bytes, most_bytes: int, seed: int) -> bytes:
        chance = random.Random(seed)
        spoilt = inputs.spoilt(content, chance) if chance.random() < 0.8 else None
        return spoilt if spoilt and len(spoilt) <= most_bytes else atheris.Mutate(content, most_bytes)

    # Torch alone has more memory than atheris grants by itself. Short inputs are no end: most are refused at once.
    limits = [
        f"-timeout={HANG_S:.0f}",
        f"-report_slow_units={HANG_S:.0f}",
        "-rss_limit_mb=0",
        "-reduce_inputs=0",
    ]
    options = [f"-seed={plan.seed}", *limits, f"-artifact_prefix={plan.folder}/"]
    atheris.Setup(["fuzz", str(plan.corpus), *options], attempt, custom_mutator=mutate)
    atheris.Fuzz()
