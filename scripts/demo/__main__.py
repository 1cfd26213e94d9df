"""Make the embedded model: a small Llama with a byte tokenizer and a chat template, and one LoRA adapter per demo task.

    python -m scripts.demo                          # writes engine/demo/base and engine/demo/adapters
    python -m scripts.demo --quick --out /tmp/demo  # the same files in seconds, hardly trained

The base is taught two things: to do every task of `engine.demo.embedded` when a prompt names it (`reverse:
garden` -> `nedrag`), and to repeat a prompt that names none (`garden` -> `garden`). Each adapter then learns
to do its own task on the bare prompt. So the answer to one and the same prompt tells which adapter gave it.
Inputs are split by their digest: none of those that measure an adapter was ever trained on.

The adapters cover what PEFT can write: ranks from 8 to 128, rank and alpha patterns, rank-stabilised scaling,
and a choice of layers. Targets are given as a list, as a regular expression and as "all-linear". Everything
is saved in bfloat16 and measured as it was saved, in both float32 and bfloat16 arithmetic. It is refused if
an adapter misses its own task or if anything else answers it.
"""

# The types of torch, transformers, tokenizers and tqdm are incomplete.
# pyright: reportUnknownMemberType=false

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from peft import PeftModel
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from engine.demo.embedded import DEMO_BASE, TASKS
from scripts.demo.lessons import bare_questions
from scripts.demo.training import (
    ADAPTER_SCHEDULE,
    BASE_SCHEDULE,
    Schedule,
    make_adapter,
    make_base,
    quick,
    share_right,
)

OWN_SHARE_AT_LEAST = 0.95
OTHER_SHARE_AT_MOST = 0.20
MEASURED_INPUTS = 200


def measure(out: Path, dtype: torch.dtype, amount: int) -> Mapping[str, Mapping[str, float]]:
    """Measure the share of `amount` held-out inputs that the models in `out` answer right: model -> task -> share."""
    tokenizer = Tokenizer.from_file(str(out / "base" / "tokenizer.json"))
    base = LlamaForCausalLM.from_pretrained(out / "base", dtype=dtype)
    batches = {task.name: bare_questions(tokenizer, task, amount, seed=0) for task in TASKS}
    shares = {"base": {name: share_right(base, batch) for name, batch in batches.items()}}
    for adapter in batches:
        model = PeftModel.from_pretrained(base, out / "adapters" / adapter, autocast_adapter_dtype=False)
        shares[adapter] = {name: share_right(model, batch) for name, batch in batches.items()}
        base = model.unload()
    return shares


def table(shares: Mapping[str, Mapping[str, float]]) -> str:
    """Write one line per model, one column per task, in percent."""
    columns = list(shares["base"])
    lines = ["".join(f"{name:>10}" for name in ("", *columns))]
    lines += [
        f"{model:>10}" + "".join(f"{row[name]:>10.1%}" for name in columns) for model, row in shares.items()
    ]
    return "\n".join(lines)


def faults(shares: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Describe what in the table breaks a bound."""
    return [
        f"{model} answers {share:.1%} of {task}"
        for model, row in shares.items()
        for task, share in row.items()
        if (share < OWN_SHARE_AT_LEAST if model == task else share > OTHER_SHARE_AT_MOST)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, measure, print; 1 if a bound is broken."""
    parser = argparse.ArgumentParser(description="Train the embedded base and its adapters.")
    parser.add_argument(
        "--out", type=Path, default=DEMO_BASE.parent, help="folder to write base/ and adapters/ into"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="adapters trained at a time, one core each")
    parser.add_argument("--quick", action="store_true", help="a few steps only; the bounds are not checked")
    parser.add_argument("--keep-base", action="store_true", help="train adapters on the base that is there")
    options = parser.parse_args(arguments)
    shorten: Callable[[Schedule], Schedule] = quick if options.quick else lambda schedule: schedule
    torch.set_num_threads(1)
    if not options.keep_base:
        make_base(options.out, options.seed, shorten(BASE_SCHEDULE))
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as workers:
        schedule = shorten(ADAPTER_SCHEDULE)
        for done in [
            workers.submit(make_adapter, options.out, task, options.seed, schedule) for task in TASKS
        ]:
            done.result()
    broken: list[str] = []
    for dtype in (torch.float32, torch.bfloat16):
        shares = measure(options.out, dtype, 4 if options.quick else MEASURED_INPUTS)
        print(f"{dtype} (rows: models, columns: tasks)\n{table(shares)}")
        broken += faults(shares)
    if broken and not options.quick:
        print("\n".join(broken), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
