"""Try many cases of a target, in this process or in workers that a watchdog watches, and keep those that fail.

A worker writes every case to a file before it tries it. So a crash or a hang of the process has its case as well.
"""

import hashlib
import multiprocessing
import os
import random
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from scripts.fuzz.case import Case, Finding, Target
from scripts.fuzz.targets import open_target

HANG_S = 300.0
"""A case that takes longer is a hang; a target of its own deadlines is far quicker."""

_CHECK_EVERY, _REPORT_EVERY_S = 50, 2.0
_MOST_FINDINGS = 20
_SPAWN = multiprocessing.get_context("spawn")
Counts = Counter[str]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to try: `target` by its name, from `seed` on, for `seconds` or `cases`; findings go to `folder`."""

    target: str
    seed: int
    folder: Path
    seconds: float
    cases: int | None = None


@dataclass(slots=True)
class Outcome:
    """What came of a plan: how many cases ended in which way, and the files of those that failed."""

    counts: Counts = field(default_factory=Counts)
    findings: list[Path] = field(default_factory=list[Path])

    @property
    def cases(self) -> int:
        """Cases that were tried."""
        return self.counts.total()


def try_cases(target: Target, plan: Plan, report: Callable[[Outcome], object]) -> Outcome:
    """Try cases in this process, and tell `report` now and then how it stands. It ends after many findings."""
    chance, outcome, since = random.Random(plan.seed), Outcome(), list[Case]()
    ends_s, reported_s = time.monotonic() + plan.seconds, time.monotonic()
    plan.folder.mkdir(parents=True, exist_ok=True)
    current = plan.folder / f"current-{os.getpid()}"
    while time.monotonic() < ends_s and (plan.cases is None or outcome.cases < plan.cases):
        case = target.draw(chance)
        current.write_bytes(case.encoded())
        outcome.counts[_tried(target, case, plan, outcome)] += 1
        since.append(case)
        if outcome.cases % _CHECK_EVERY == 0 or outcome.cases == plan.cases:
            _check(target, since, plan, outcome)
            since.clear()
        if len(outcome.findings) >= _MOST_FINDINGS:
            break
        if time.monotonic() - reported_s > _REPORT_EVERY_S:
            report(outcome)
            reported_s = time.monotonic()
    current.unlink()
    report(outcome)
    return outcome


def _tried(target: Target, case: Case, plan: Plan, outcome: Outcome) -> str:
    try:
        return target.run(case)
    except (Exception, BaseExceptionGroup) as error:  # noqa: BLE001 - what a fuzzer is for
        keep(case, plan, outcome, "".join(traceback.format_exception(error)))
        return "finding" if isinstance(error, Finding) else f"finding ({type(error).__name__})"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        keep(case, plan, outcome, "".join(traceback.format_exception(error)))  # a panic of a native library
        return f"finding ({type(error).__name__})"


def _check(target: Target, since: list[Case], plan: Plan, outcome: Outcome) -> None:
    """Keep every case since the last check if they left something behind: any of them may have."""
    try:
        target.check()
    except Finding as error:
        for case in since:
            keep(case, plan, outcome, f"{error}, after one of {len(since)} cases\n")


def keep(case: Case, plan: Plan, outcome: Outcome, why: str) -> None:
    """Write a case and why it was kept to the folder; `--replay` tries it again."""
    name = f"{plan.target}-{hashlib.blake2b(case.encoded(), digest_size=6).hexdigest()}"
    path = plan.folder / f"{name}.case"
    path.write_bytes(case.encoded())
    path.with_suffix(".txt").write_text(why, errors="backslashreplace")
    outcome.findings.append(path)


@dataclass(slots=True)
class _Worker:
    """A process that tries cases, and what it told last."""

    process: BaseProcess
    pipe: Connection
    plan: Plan
    outcome: Outcome = field(default_factory=Outcome)
    told_s: float = field(default_factory=time.monotonic)


def run_workers(plan: Plan, workers: int, report: Callable[[Outcome], object]) -> Outcome:
    """Try cases in processes of their own; one that hangs or dies leaves its case and is replaced."""
    ends_s, ended = time.monotonic() + plan.seconds, list[Outcome]()
    alive = [_start(plan, number, plan.seconds) for number in range(workers)]
    try:
        while alive:
            for pipe in wait([worker.pipe for worker in alive], timeout=1.0):
                worker = next(worker for worker in alive if worker.pipe is pipe)
                if not _heard(worker):
                    alive.remove(worker)
                    ended.append(worker.outcome)
                    alive += _replaced(worker, ends_s, len(ended) + workers)
            for worker in alive:
                if time.monotonic() - worker.told_s > HANG_S:
                    worker.process.kill()
            report(_sum([*ended, *(worker.outcome for worker in alive)]))
    finally:
        for worker in alive:
            worker.process.kill()
            worker.process.join()
    return _sum(ended)


def _start(plan: Plan, number: int, seconds: float) -> _Worker:
    ours, theirs = _SPAWN.Pipe(duplex=False)
    own = Plan(plan.target, plan.seed * 1000 + number, plan.folder, seconds, plan.cases)
    process = _SPAWN.Process(target=_work, args=(own, theirs), name=f"fuzz-{number}")
    process.start()
    theirs.close()
    return _Worker(process, ours, own)


def _work(plan: Plan, pipe: Connection) -> None:
    """Try cases in a worker and tell how it stands; what libraries print goes to a log beside the findings."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    log = os.open(plan.folder / f"{plan.target}-{plan.seed}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    target = open_target(plan.target)
    try:
        try_cases(target, plan, pipe.send)
    finally:
        target.close()


def _heard(worker: _Worker) -> bool:
    """Take what a worker tells; return False when it has ended."""
    try:
        worker.outcome = worker.pipe.recv()
    except EOFError:
        worker.process.join()
        return False
    worker.told_s = time.monotonic()
    return True


def _replaced(worker: _Worker, ends_s: float, number: int) -> list[_Worker]:
    """Keep the case of a worker that died or hung, and return the worker that goes on for it, if there is time."""
    if worker.process.exitcode == 0:
        return []
    current = worker.plan.folder / f"current-{worker.process.pid}"
    if current.exists():
        why = f"the worker ended with {worker.process.exitcode}; {-9} after {HANG_S:g} s without an end\n"
        keep(Case.decoded(current.read_bytes()), worker.plan, worker.outcome, why)
        worker.outcome.counts["finding (crash or hang)"] += 1
        current.unlink()
    left_s = ends_s - time.monotonic()
    too_many = len(worker.outcome.findings) >= _MOST_FINDINGS or number > _MOST_FINDINGS
    return [] if left_s <= 0 or too_many else [_start(worker.plan, number, left_s)]


def _sum(outcomes: list[Outcome]) -> Outcome:
    whole = Outcome()
    for outcome in outcomes:
        whole.counts.update(outcome.counts)
        whole.findings += outcome.findings
    return whole


def row(plan: Plan, workers: int, started: str, took_s: float, outcome: Outcome) -> Mapping[str, object]:
    """Return the results row of a run."""
    return {
        "started": started,
        "target": plan.target,
        "seed": plan.seed,
        "workers": workers,
        "seconds": round(took_s, 1),
        "cases": outcome.cases,
        "outcomes": dict(sorted(outcome.counts.items())),
        "findings": len(outcome.findings),
    }
