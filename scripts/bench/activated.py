"""Measure what activated LoRAs spare: adapters that are asked in turn about one conversation.

    python -m scripts.bench.activated --size 100m --out results/activated.jsonl

The same random weights are served as plain and as activated LoRAs, whose invocation ends the prompt. Each round has a
conversation of its own, and each adapter draws a token for it; all have answered before, so that none is still loaded.
A row is one kind. By the adapter's turn it has the tokens computed, and medians of the seconds to the token. It has
the processor's seconds too, which other programs disturb less.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from engine import LLM, SamplingParams
from lora.format.peft_config import CONFIG_FILE, INVOCATION_FIELD
from scripts.arguments import count, one_line
from scripts.bench import machine
from scripts.bench.llama import SHAPES, VOCABULARY_SIZE, LlamaShape
from scripts.bench.make_models import make_adapter, make_base
from scripts.results import Row, append_rows

INVOCATION = (301, 302, 303, 304)
KINDS = ("lora", "alora")
_LEAST_TOKEN_ID = 400  # of conversations, which have no token of the invocation
_PARAMS = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)


def make_inputs(shape: LlamaShape, root: Path, adapters: int, rank: int) -> None:
    """Write a base to `root`/base, and to `root`/KIND/N each adapter of each kind, with the same weights."""
    make_base(shape, root / "base", seed=0)
    for number in range(adapters):
        for kind in KINDS:
            folder = root / kind / str(number)
            make_adapter(shape, rank, root / "base", folder, seed=1 + number)
            if kind == "alora":
                config = json.loads((folder / CONFIG_FILE).read_text())
                (folder / CONFIG_FILE).write_text(json.dumps(config | {INVOCATION_FIELD: list(INVOCATION)}))


def conversation(number: int, tokens: int) -> tuple[int, ...]:
    """Draw the conversation of a round."""
    rng = random.Random(f"conversation {number}")
    return tuple(rng.randrange(_LEAST_TOKEN_ID, VOCABULARY_SIZE - 8) for _ in range(tokens))


def measure(root: Path, kind: str, adapters: int, tokens: int, rounds: int) -> Row:
    """Ask the adapters of a kind in turn, a conversation a round."""
    loras = {str(number): root / kind / str(number) for number in range(adapters)}
    first_token_s, cpu_s = ([list[float]() for _ in loras] for _ in range(2))
    computed: list[int] = []
    with LLM(root / "base", loras, max_model_len=tokens + 16, max_num_seqs=4) as llm:
        for name in loras:
            llm.generate([(*conversation(-1, 16), *INVOCATION)], _PARAMS, name)
        with machine.OtherProcesses() as others:
            for number in range(rounds):
                prompt = (*conversation(number, tokens), *INVOCATION)
                computed = []
                for turn, name in enumerate(loras):
                    began_s = time.process_time()
                    (result,) = llm.generate([prompt], _PARAMS, name)
                    cpu_s[turn].append(time.process_time() - began_s)
                    computed.append(len(prompt) - result.cached_tokens)
                    first_token_s[turn].append(result.token_times_s[0])
    return {
        "kind": kind,
        "prompt_tokens": tokens + len(INVOCATION),
        "computed_tokens": computed,
        "first_token_s": [round(median(each), 4) for each in first_token_s],
        "cpu_s": [round(median(each), 4) for each in cpu_s],
        "other_cores": round(others.cores, 2),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure both kinds, print a line for each, and with --out write the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=list(SHAPES), default="100m")
    parser.add_argument("--adapters", type=count, default=8)
    parser.add_argument("--rank", type=count, default=16)
    parser.add_argument("--tokens", type=count, default=2048, help="of a conversation")
    parser.add_argument("--rounds", type=count, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    about: Row = {
        "started": time.time(),
        "machine": machine.describe(),
        "size": given.size,
        "rank": given.rank,
    }
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(SHAPES[given.size], Path(folder), given.adapters, given.rank)
        for kind in KINDS:
            rows.append({**about, **measure(Path(folder), kind, given.adapters, given.tokens, given.rounds)})
            row = rows[-1]
            for field in ("computed_tokens", "first_token_s", "cpu_s"):
                print(f"{kind:6}{field:16}{row[field]}", flush=True)
    if given.out is not None:
        append_rows(given.out, rows)


if __name__ == "__main__":
    with one_line("scripts.bench.activated"):
        main()
