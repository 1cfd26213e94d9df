"""Workloads of the offline benchmark: which prompts run under which adapters.

Every engine reads the same files, so what they do is the same to the token: a JSON list of rows
{"prompt_token_ids", "adapter" (a name or null for the base), "max_tokens"}. It may not know any engine.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random

LOWEST_TOKEN_ID = 256


@dataclass(frozen=True, slots=True)
class Adapter:
    """One entry of an adapter index."""

    name: str
    path: str
    rank: int


@dataclass(frozen=True, slots=True)
class Row:
    """One request: greedy, `max_tokens` tokens whatever they are."""

    prompt_token_ids: tuple[int, ...]
    adapter: str | None
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """Rows that are submitted at once."""

    kind: str
    rows: tuple[Row, ...]

    @property
    def batch(self) -> int:
        """Number of rows."""
        return len(self.rows)

    @property
    def name(self) -> str:
        """Also the stem of its file."""
        return f"b{self.batch}_{self.kind}"


def read_index(path: Path) -> tuple[Adapter, ...]:
    """The adapters of an index.json, in its order."""
    return tuple(Adapter(**entry) for entry in json.loads(path.read_text()))


def choose(adapters: Sequence[Adapter], rank: int) -> Callable[[int], str]:
    """The names of one rank's adapters, going round."""
    names = [adapter.name for adapter in adapters if adapter.rank == rank]
    if not names:
        raise ValueError(f"rank={rank} has no adapter in the index: make the models with more adapters")
    return lambda row: names[row % len(names)]


def mixed(adapters: Sequence[Adapter]) -> Callable[[int], str]:
    """All adapters, going round: row after row another rank."""
    return lambda row: adapters[row % len(adapters)].name


def mixbase(adapters: Sequence[Adapter]) -> Callable[[int], str | None]:
    """All adapters, going round, but every fourth row the base."""
    return lambda row: None if row % 4 == 3 else adapters[row % len(adapters)].name


KINDS: Mapping[str, Callable[[Sequence[Adapter]], Callable[[int], str | None]]] = {
    "base": lambda adapters: lambda row: None,
    "one": lambda adapters: lambda row: choose(adapters, 16)(0),
    "r8": lambda adapters: choose(adapters, 8),
    "r128": lambda adapters: choose(adapters, 128),
    "mixed": mixed,
    "mixbase": mixbase,
}
"""How a kind of workload gives row `i` its adapter."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of every prompt and of every answer, and how many token ids there are."""

    prompt_tokens: int = 128
    output_tokens: int = 64
    vocabulary: int = 31_900


def make(kind: str, batch: int, adapters: Sequence[Adapter], lengths: Lengths, seed: int = 0) -> Workload:
    """Draw a workload. All kinds share their prompts; no prompt of one batch size is in another's, so that an
    engine that remembers prefixes has met none of them."""
    rng = Random(f"{seed}/{batch}")
    adapter_of = KINDS[kind](adapters)
    prompts = [
        tuple(rng.randrange(LOWEST_TOKEN_ID, lengths.vocabulary) for _ in range(lengths.prompt_tokens))
        for _ in range(batch)
    ]
    rows = tuple(Row(prompt, adapter_of(row), lengths.output_tokens) for row, prompt in enumerate(prompts))
    return Workload(kind, rows)


def write(workload: Workload, folder: Path) -> Path:
    """Write the rows as FOLDER/NAME.json."""
    path = folder / f"{workload.name}.json"
    path.write_text(json.dumps([asdict(row) for row in workload.rows]))
    return path


def read(path: Path) -> Workload:
    """Read what `write` wrote."""
    rows = tuple(
        Row(tuple(row["prompt_token_ids"]), row["adapter"], row["max_tokens"])
        for row in json.loads(path.read_text())
    )
    return Workload(path.stem.partition("_")[2], rows)


def freshen(rows: Sequence[Row], salt: int) -> tuple[Row, ...]:
    """The same work under another first token for each salt, so that no remembered prefix fits; salt 0
    changes nothing."""
    if salt == 0:
        return tuple(rows)
    return tuple(replace(row, prompt_token_ids=_salted(row.prompt_token_ids, salt)) for row in rows)


def _salted(token_ids: tuple[int, ...], salt: int) -> tuple[int, ...]:
    return ((token_ids[0] + salt) % LOWEST_TOKEN_ID, *token_ids[1:])
