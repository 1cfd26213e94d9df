"""Try one case after another in this process, and keep those that fail.

Every case is written to a file before it is tried. So a crash or a hang of the process has its case as well.
"""

import hashlib
import os
import random
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from scripts.fuzz.case import Case, Finding, Target

HANG_S = 300.0
"""A case that takes longer is a hang; a target of its own deadlines is far quicker."""

MOST_FINDINGS = 20
_CHECK_EVERY, _REPORT_EVERY_S = 50, 2.0
Counts = Counter[str]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to try: `target` by its name, from `seed` on, for `seconds` or `cases`; findings go to `folder`.

    With `corpus` atheris draws the cases, and keeps there what took a way that none had taken before.
    """

    target: str
    seed: int
    folder: Path
    seconds: float
    cases: int | None = None
    corpus: Path | None = None


@dataclass(slots=True)
class Outcome:
    """What came of a plan: how many cases ended in which way, and the files of those that failed."""

    counts: Counts = field(default_factory=Counts)
    findings: list[Path] = field(default_factory=list[Path])

    @property
    def cases(self) -> int:
        """Cases that were tried."""
        return self.counts.total()


class Trial:
    """The trying of a plan's cases on its target, until its time is over or much was found."""

    def __init__(self, target: Target, plan: Plan, report: Callable[[Outcome], object]) -> None:
        """Tell `report` now and then how it stands."""
        self._target, self._plan, self._report = target, plan, report
        self._outcome, self._since = Outcome(), list[Case]()
        self._ends_s, self._reported_s = time.monotonic() + plan.seconds, time.monotonic()
        plan.folder.mkdir(parents=True, exist_ok=True)
        self._current = plan.folder / f"current-{os.getpid()}"

    @property
    def goes_on(self) -> bool:
        """Whether more cases are to be tried."""
        few = self._plan.cases is None or self._outcome.cases < self._plan.cases
        return few and time.monotonic() < self._ends_s and len(self._outcome.findings) < MOST_FINDINGS

    def take(self, case: Case) -> None:
        """Try the case."""
        self._current.write_bytes(case.encoded())
        self._outcome.counts[self._tried(case)] += 1
        self._since.append(case)
        if self._outcome.cases % _CHECK_EVERY == 0 or self._outcome.cases == self._plan.cases:
            self._check()
            self._since.clear()
        if time.monotonic() - self._reported_s > _REPORT_EVERY_S:
            self._report(self._outcome)
            self._reported_s = time.monotonic()

    def end(self) -> Outcome:
        """Report for the last time."""
        self._current.unlink(missing_ok=True)
        self._report(self._outcome)
        return self._outcome

    def _tried(self, case: Case) -> str:
        try:
            return self._target.run(case)
        except (Exception, BaseExceptionGroup) as error:  # noqa: BLE001 - what a fuzzer is for
            keep(case, self._plan, self._outcome, "".join(traceback.format_exception(error)))
            return "finding" if isinstance(error, Finding) else f"finding ({type(error).__name__})"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            why = "".join(traceback.format_exception(error))  # a panic of a native library
            keep(case, self._plan, self._outcome, why)
            return f"finding ({type(error).__name__})"

    def _check(self) -> None:
        """Keep every case since the last check if they left something behind: any of them may have."""
        try:
            self._target.check()
        except Finding as error:
            for case in self._since:
                keep(case, self._plan, self._outcome, f"{error}, after one of {len(self._since)} cases\n")


def try_cases(target: Target, plan: Plan, report: Callable[[Outcome], object]) -> Outcome:
    """Try cases that the target draws by chance."""
    chance, trial = random.Random(plan.seed), Trial(target, plan, report)
    while trial.goes_on:
        trial.take(target.draw(chance))
    return trial.end()


def keep(case: Case, plan: Plan, outcome: Outcome, why: str) -> None:
    """Write a case and why it was kept to the folder; `--replay` tries it again."""
    name = f"{plan.target}-{hashlib.blake2b(case.encoded(), digest_size=6).hexdigest()}"
    path = plan.folder / f"{name}.case"
    path.write_bytes(case.encoded())
    path.with_suffix(".txt").write_text(why, errors="backslashreplace")
    outcome.findings.append(path)
