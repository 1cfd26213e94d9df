"""Check everything that runs on a GPU against the CPU's arithmetic, and time it against the machine's limits.

    python -m scripts.gpu                 # on a CUDA machine
    python -m scripts.gpu --dry-run       # the same path on a CPU: plain torch, tiny shapes

One JSON object a line goes to --out as it is found, a table to standard output at the end. The exit code is 1
if any check failed. A dry run checks results alone: its times mean nothing, and no goal is met or missed.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from scripts.arguments import seconds
from scripts.gpu.backends.base import DeviceBackends
from scripts.gpu.backends.dry_run import DryRunBackends
from scripts.gpu.context import CheckContext
from scripts.gpu.finding import Finding, Verdict, summary, table
from scripts.gpu.sections import SECTIONS, run
from scripts.gpu.sizes import FULL, TINY


def main(
    arguments: Sequence[str] | None = None,
    dry: DeviceBackends | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Check, time, write; return the exit code. A dry run uses `dry` in place of plain torch, if given."""
    options = _parse(arguments)
    context = CheckContext(
        (dry or DryRunBackends()) if options.dry_run else _cuda(),
        TINY if options.dry_run else FULL,
        clock,
        options.limit_s,
        options.seed,
    )
    chosen = [section for section in SECTIONS if not options.only or section.name in options.only]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    began_s = clock()
    with options.out.open("w") as file:

        def tell(finding: Finding) -> None:
            file.write(finding.as_json() + "\n")
            file.flush()
            if finding.verdict in (Verdict.FAILED, Verdict.SKIPPED) or not options.quiet:
                line = f"{finding.section}: {finding.name} {finding.verdict.value} {finding.note}"
                print(f"{clock() - began_s:6.1f} s  {line}", flush=True)

        found = run(chosen, context, tell)
    print(f"\n{table(found)}\n\n{summary(found)}; each as a line of {options.out}")
    return int(any(finding.verdict is Verdict.FAILED for finding in found))


def _cuda() -> DeviceBackends:
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device: run it where there is one, or with --dry-run")
    torch.cuda.set_device(0)
    # Imported late: it needs Triton, which only a CUDA machine has.
    from scripts.gpu.backends.cuda import CudaBackends  # noqa: PLC0415

    return CudaBackends()


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    folder = Path(os.environ.get("OUT", "results"))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="on the CPU, tiny: shows that the path is whole"
    )
    parser.add_argument(
        "--out", type=Path, help="default: results/gpu_check.jsonl, $OUT/... where that is set"
    )
    parser.add_argument("--limit-s", type=seconds, default=540.0, help="begin nothing that would outlast it")
    parser.add_argument("--only", nargs="+", choices=[section.name for section in SECTIONS])
    parser.add_argument(
        "--seed", type=int, default=time.time_ns() % 2**31, help="default: another every time"
    )
    parser.add_argument("--quiet", action="store_true", help="no line for each finding as it comes")
    options = parser.parse_args(arguments)
    name = "gpu_check_dry.jsonl" if options.dry_run else "gpu_check.jsonl"
    options.out = options.out or folder / name
    return options


if __name__ == "__main__":
    sys.exit(main())
