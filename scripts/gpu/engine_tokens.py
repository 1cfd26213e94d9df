"""The engine on the device against the engine on the CPU, token for token: adapters of many ranks, greedy and seeded
draws, requests that come and go, preemption, and memory that K/V and adapters share. In bfloat16 by its logits.
"""

import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from engine.build.assembly import Engine, assemble
from engine.config.config import Device, EngineConfig
from lora.adapter import BASE
from scheduler.plan import TokenEvent
from scheduler.request import Request, SamplingParams
from scripts.gpu import small_model
from scripts.gpu.row import Row, check, measured
from scripts.gpu.stand import Stand, relative_error

BLOCK_BYTES = small_model.LAYERS * 2 * small_model.KV_HEADS * small_model.HEAD_DIM * 16 * 4
BF16_LIMIT = 0.05
_MOST_IDLE = 240  # half seconds
_WAYS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.0},
    {"temperature": 0.8},
    {"temperature": 1.1, "top_k": 20},
    {"temperature": 0.9, "top_p": 0.8},
    {"temperature": 0.7, "min_p": 0.05},
)
_PENALISED: dict[str, Any] = {"temperature": 0.7, "presence_penalty": 0.8, "repetition_penalty": 1.2}
_VARIANTS: dict[str, dict[str, Any]] = {
    "graphs": {"unified_memory": "off"},
    "graphs, shared memory": {"unified_memory": "on", "adapter_bytes": 12 << 20},
    "no graphs": {"unified_memory": "off", "cuda_graphs": False},
    "graphs, preempted": {"unified_memory": "off", "kv_cache_bytes": 12 * BLOCK_BYTES},
}


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, and the adapter's name, None for the base."""

    prompt: tuple[int, ...]
    adapter: str | None
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class Answered:
    """Each request's events, and how often a sequence was preempted."""

    events: list[list[TokenEvent]]
    preemptions: int

    @property
    def tokens(self) -> list[list[int]]:
        """Each request's."""
        return [[each.token_id for each in events if each.token_id is not None] for events in self.events]


def rows(stand: Stand) -> Iterator[Row]:
    """Every variant of the device's engine; float32 first."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small_model.write(folder, seed=stand.generator.initial_seed() % 2**31)
        asked = requests(stand.sizes.requests, penalised=False)
        mixed = requests(stand.sizes.requests, penalised=True)
        known, known_mixed = (answer(_cpu(folder), each) for each in (asked, mixed))
        for label, options in _VARIANTS.items():
            config = replace(_config(folder, _device(stand)), **options)
            yield from stand.try_row(
                label, lambda label=label, config=config: _same(label, config, asked, known)
            )
        config = _config(folder, _device(stand))
        yield from stand.try_row("penalties", lambda: _same("penalties", config, mixed, known_mixed))
        yield from _narrow(stand, folder, asked)


def requests(count: int, penalised: bool) -> list[Asked]:
    """Prompts of all lengths; with `penalised`, some draws need the tokens before them."""
    rng = random.Random(count)
    ways = (*_WAYS, _PENALISED) if penalised else _WAYS
    made = []
    for number in range(count):
        prompt = tuple(rng.randrange(3, small_model.VOCAB) for _ in range(rng.randint(1, 90)))
        params = SamplingParams(
            max_tokens=rng.randint(1, 28),
            seed=number,
            ignore_eos=True,
            n=1 + (number % 7 == 3),
            **ways[number % len(ways)],
        )
        made.append(Asked(prompt, rng.choice([None, *small_model.RANKS]), params))
    return made


def _config(folder: Path, device: Device) -> EngineConfig:
    return EngineConfig(
        model=str(folder / "base"),
        lora_dir=folder / "loras",
        dtype="float32",
        device=device,
        max_model_len=128,
        max_num_seqs=16,
        max_num_batched_tokens=96,
        kv_cache_bytes=400 * BLOCK_BYTES,
        adapter_bytes=64 << 20,
        adapter_patience_s=0.05,
        progress=False,
    )


def _device(stand: Stand) -> Device:
    return "cuda" if stand.device.type == "cuda" else "cpu"


def _cpu(folder: Path) -> EngineConfig:
    return replace(_config(folder, "cpu"), unified_memory="off", attention_backend="torch")


def answer(config: EngineConfig, asked: Sequence[Asked]) -> Answered:
    """Half of the requests at once, the others one by one while those run."""
    engine = assemble(config)
    try:
        events = _run(engine, asked)
        return Answered(events, engine.core.live().preemptions)
    finally:
        engine.core.wait_for_step()
        engine.close()


def _run(engine: Engine, asked: Sequence[Asked]) -> list[list[TokenEvent]]:
    waiting = list(enumerate(asked))[::-1]
    events: list[list[TokenEvent]] = [[] for _ in asked]
    idle = 0
    for _ in range(max(1, len(asked) // 2)):
        _submit(engine, *waiting.pop())
    while waiting or engine.core.num_live_requests:
        result = engine.core.step()
        for failure in result.failures:
            raise failure.error
        for event in result.events:
            events[int(event.key.request_id)].append(event)
        if waiting:
            _submit(engine, *waiting.pop())
        elif result.idle:
            idle += 1
            assert idle < _MOST_IDLE, "the engine has requests and nothing to run"
            engine.wait_ready()
    return [sorted(each, key=lambda event: event.key.index) for each in events]


def _submit(engine: Engine, number: int, one: Asked) -> None:
    adapter = engine.store.resolve(one.adapter) if one.adapter else BASE
    engine.core.submit(Request(str(number), one.prompt, adapter, one.params, (), time.monotonic()))


def _same(name: str, config: EngineConfig, asked: Sequence[Asked], known: Answered) -> Row:
    """How many requests' tokens differ from what is known."""
    found = answer(config, asked)
    differ = sum(one != other for one, other in zip(found.tokens, known.tokens, strict=True))
    tokens = sum(map(len, known.tokens))
    note = f"of {len(asked)}, {tokens} tokens, {found.preemptions} preemptions"
    return check(f"tokens, {name}", differ, 0, "requests differ", note)


def _narrow(stand: Stand, folder: Path, asked: Sequence[Asked]) -> Iterator[Row]:
    """bfloat16: the log-probabilities of prompts, against float32 over the same numbers; and graphs against none."""
    scored = [
        replace(
            one,
            params=SamplingParams(max_tokens=1, temperature=0.0, seed=0, prompt_logprobs=0, ignore_eos=True),
        )
        for one in asked
        if len(one.prompt) > 1
    ]
    narrow = replace(_config(folder, _device(stand)), dtype="bfloat16")

    def row() -> Row:
        found, want = (_scores(answer(config, scored)) for config in (narrow, _cpu(folder)))
        return check("log-probabilities, bfloat16", relative_error(found, want), BF16_LIMIT, "rel. error")

    yield from stand.try_row("log-probabilities, bfloat16", row)

    def agreement() -> Row:
        one, other = (answer(replace(narrow, cuda_graphs=on), asked).tokens for on in (True, False))
        same = sum(a == b for a, b in zip(one, other, strict=True))
        return measured("tokens, bfloat16", same / len(asked), "of requests alike", "with graphs and without")

    yield from stand.try_row("tokens, bfloat16", agreement)


def _scores(answered: Answered) -> torch.Tensor:
    return torch.tensor([each.logprob for events in answered.events for each in events[0].prompt_logprobs])
