"""Try many cases of a target in workers that a watchdog watches: one that hangs or dies leaves its case."""

import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from scripts.fuzz.case import Case
from scripts.fuzz.guided import try_guided
from scripts.fuzz.targets import open_target
from scripts.fuzz.trial import HANG_S, MOST_FINDINGS, Outcome, Plan, keep, try_cases

_SPAWN = multiprocessing.get_context("spawn")


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
    own = replace(plan, seed=plan.seed * 1000 + number, seconds=seconds)
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
        (try_cases if plan.corpus is None else try_guided)(target, plan, pipe.send)
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
    too_many = len(worker.outcome.findings) >= MOST_FINDINGS or number > MOST_FINDINGS
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
        "drawn_by": "chance" if plan.corpus is None else "atheris",
        "workers": workers,
        "seconds": round(took_s, 1),
        "cases": outcome.cases,
        "outcomes": dict(sorted(outcome.counts.items())),
        "findings": len(outcome.findings),
    }
