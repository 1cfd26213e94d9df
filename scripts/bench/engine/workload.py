"""Workloads of the offline benchmark: which prompts run under which adapters. Knows no engine.

Every engine reads the same files, so that all do the same work to the token. A file is a JSON list of
{"prompt_token_ids", "adapter" (a name, or null for the base), "max_tokens"}.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random

from scripts.bench.llama import BenchAdapter

LOWEST_TOKEN_ID = 256


@dataclass(frozen=True, slots=True)
class OfflineRequest:
    """One greedy request for exactly `max_tokens` tokens."""

    prompt_token_ids: tuple[int, ...]
    adapter: str | None
    max_tokens: int


@dataclass(frozen=True, slots=True)
class OfflineWorkload:
    """Requests that are submitted at once."""

    kind: str
    requests: tuple[OfflineRequest, ...]

    @property
    def batch(self) -> int:
        """Number of requests."""
        return len(self.requests)

    @property
    def name(self) -> str:
        """Also the stem of its file."""
        return f"b{self.batch}_{self.kind}"


def choose(adapters: Sequence[BenchAdapter], rank: int) -> Callable[[int], str]:
    """Name one rank's adapters in turn."""
    names = [adapter.name for adapter in adapters if adapter.rank == rank]
    if not names:
        raise ValueError(f"rank={rank} has no adapter in the index: make the models with more adapters")
    return lambda at: names[at % len(names)]


def mixed(adapters: Sequence[BenchAdapter]) -> Callable[[int], str]:
    """Name all adapters in turn, so that neighbours have different ranks."""
    return lambda at: adapters[at % len(adapters)].name


def mixbase(adapters: Sequence[BenchAdapter]) -> Callable[[int], str | None]:
    """Name all adapters in turn, but the base for every fourth request."""
    return lambda at: None if at % 4 == 3 else adapters[at % len(adapters)].name


KINDS: Mapping[str, Callable[[Sequence[BenchAdapter]], Callable[[int], str | None]]] = {
    "base": lambda adapters: lambda at: None,
    "one": lambda adapters: lambda at: choose(adapters, 16)(0),
    "r8": lambda adapters: choose(adapters, 8),
    "r128": lambda adapters: choose(adapters, 128),
    "mixed": mixed,
    "mixbase": mixbase,
}
"""How a kind of workload gives its i-th request an adapter."""


@dataclass(frozen=True, slots=True)
class OfflineLengths:
    """Tokens of every prompt and of every answer, and how many token ids there are."""

    prompt_tokens: int = 128
    output_tokens: int = 64
    vocabulary: int = 31_900


def make(
    kind: str, batch: int, adapters: Sequence[BenchAdapter], lengths: OfflineLengths, seed: int = 0
) -> OfflineWorkload:
    """Draw a workload. All kinds share their prompts.

    No prompt of one batch size is in another's, so that a prefix cache has met none of them.
    """
    rng = Random(f"{seed}/{batch}")
    adapter_of = KINDS[kind](adapters)
    prompts = [
        tuple(rng.randrange(LOWEST_TOKEN_ID, lengths.vocabulary) for _ in range(lengths.prompt_tokens))
        for _ in range(batch)
    ]
    requests = (
        OfflineRequest(prompt, adapter_of(at), lengths.output_tokens) for at, prompt in enumerate(prompts)
    )
    return OfflineWorkload(kind, tuple(requests))


def write(workload: OfflineWorkload, folder: Path) -> Path:
    """Write the requests as FOLDER/NAME.json."""
    path = folder / f"{workload.name}.json"
    path.write_text(json.dumps([asdict(request) for request in workload.requests]))
    return path


def read(path: Path) -> OfflineWorkload:
    """Read what `write` wrote."""
    requests = tuple(
        OfflineRequest(tuple(row["prompt_token_ids"]), row["adapter"], row["max_tokens"])
        for row in json.loads(path.read_text())
    )
    return OfflineWorkload(path.stem.partition("_")[2], requests)


def freshen(requests: Sequence[OfflineRequest], salt: int) -> tuple[OfflineRequest, ...]:
    """Change the first token by the salt, so that no cached prefix fits; salt 0 changes nothing."""
    if salt == 0:
        return tuple(requests)
    return tuple(replace(one, prompt_token_ids=_salted(one.prompt_token_ids, salt)) for one in requests)


def _salted(token_ids: tuple[int, ...], salt: int) -> tuple[int, ...]:
    return ((token_ids[0] + salt) % LOWEST_TOKEN_ID, *token_ids[1:])
