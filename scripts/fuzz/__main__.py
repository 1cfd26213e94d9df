"""Try spoilt inputs on one target for hours: python -m scripts.fuzz TARGET --hours H.

Cases that fail are kept in a folder and can be tried again one by one. Exit codes: 0 nothing was found, 1 something
was, 2 the command cannot be used.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from scripts.arguments import positive
from scripts.fuzz.campaign import row, run_workers
from scripts.fuzz.case import Case, Finding
from scripts.fuzz.guided import AtherisMissing, load_atheris
from scripts.fuzz.targets import TARGETS, open_target
from scripts.fuzz.trial import Outcome, Plan
from scripts.results import append_rows

RESULTS, FINDINGS = Path("results/fuzz.jsonl"), Path("fuzz-findings")
_MOST_HOURS, _MOST_WORKERS = 1000.0, 64


def _parser() -> argparse.ArgumentParser:
    names = "; ".join(f"{name}: {meaning}" for name, (_, meaning) in TARGETS.items())
    parser = argparse.ArgumentParser("python -m scripts.fuzz", description="Try spoilt inputs on one target.")
    parser.add_argument("target", choices=list(TARGETS), metavar="TARGET", help=names)
    parser.add_argument("--hours", type=positive, default=0.1, metavar="H", help="how long (default: 0.1)")
    parser.add_argument("--cases", type=int, metavar="N", help="end each worker after so many cases")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="where chance begins (default: 1)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes (default: 1)")
    parser.add_argument(
        "--findings", type=Path, default=FINDINGS, metavar="DIR", help="where failing cases go"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="where the counts go")
    parser.add_argument(
        "--corpus", type=Path, metavar="DIR", help="let atheris draw, from inputs that it keeps here"
    )
    parser.add_argument(
        "--replay", type=Path, metavar="FILE", help="try this failing case again, and no other"
    )
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run the fuzzer and return the process's exit code."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if not 0 < given.hours <= _MOST_HOURS:
        parser.error(f"--hours {given.hours}: give a number above 0, at most {_MOST_HOURS:g}")
    if not 1 <= given.workers <= _MOST_WORKERS:
        parser.error(f"--workers {given.workers}: give a number from 1 to {_MOST_WORKERS}")
    if given.cases is not None and given.cases < 1:
        parser.error(f"--cases {given.cases}: give a number of at least 1")
    if given.replay is not None:
        if not given.replay.is_file():
            parser.error(f"--replay {given.replay}: there is no such file, give one that ends in .case")
        return replay(given.target, given.replay)
    if given.corpus is not None:
        try:
            load_atheris()
        except AtherisMissing as error:
            parser.error(f"--corpus {given.corpus}: {error}")
    plan = Plan(given.target, given.seed, given.findings, given.hours * 3600, given.cases, given.corpus)
    started, began_s = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    outcome = run_workers(plan, given.workers, lambda so_far: _show(plan, began_s, so_far))
    sys.stderr.write("\n")
    append_rows(given.results, [row(plan, given.workers, started, time.monotonic() - began_s, outcome)])
    sys.stdout.write(f"{outcome.cases} cases, {len(outcome.findings)} findings: {dict(outcome.counts)}\n")
    for path in outcome.findings:
        sys.stdout.write(f"{path}: try it again with --replay, {path.with_suffix('.txt').name} says why\n")
    return 1 if outcome.findings else 0


def replay(name: str, path: Path) -> int:
    """Try one case again and say what came of it."""
    target = open_target(name)
    try:
        came = target.run(Case.decoded(path.read_bytes()))
        target.check()
    except Finding as error:
        sys.stdout.write(f"{path}: {error}\n")
        return 1
    finally:
        target.close()
    sys.stdout.write(f"{path}: {came}\n")
    return 0


def _show(plan: Plan, began_s: float, so_far: Outcome) -> None:
    took_s = time.monotonic() - began_s
    rate = so_far.cases / max(took_s, 1e-9)
    sys.stderr.write(
        f"\r{plan.target}: {took_s:.0f} of {plan.seconds:.0f} s, {so_far.cases} cases, {rate:.1f}/s, "
        f"{len(so_far.findings)} findings "
    )
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
