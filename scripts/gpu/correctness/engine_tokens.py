"""Check the engine on the device against the engine on the CPU, token for token.

Requests come and go under adapters of many ranks, with greedy and seeded draws, preemption, and memory that
K/V and adapters share. In bfloat16 log-probabilities are compared instead.
"""

import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from engine.assembly.assembly import Engine, assemble
from engine.config.config import Device, EngineConfig
from lora.adapter import BASE, AdapterRef
from scheduler.plan import TokenEvent
from scheduler.request import Request, SamplingParams
from scripts.gpu.context import CheckContext, relative_error
from scripts.gpu.correctness import small_model
from scripts.gpu.finding import Finding, check, measured

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
class EngineRequest:
    """A request, and the adapter's name, None for the base."""

    prompt: tuple[int, ...]
    adapter: str | None
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class EngineAnswers:
    """Each request's events, and how often a sequence was preempted."""

    events: list[list[TokenEvent]]
    preemptions: int

    @property
    def tokens(self) -> list[list[int]]:
        """Each request's tokens."""
        return [[each.token_id for each in events if each.token_id is not None] for events in self.events]


def findings(context: CheckContext) -> Iterator[Finding]:
    """Check every variant of the device's engine; float32 first."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small_model.write(folder, seed=context.generator.initial_seed() % 2**31)
        asked = requests(context.sizes.requests, penalised=False)
        mixed = requests(context.sizes.requests, penalised=True)
        known, known_mixed = (answer(_cpu(folder), each) for each in (asked, mixed))
        for label, options in _VARIANTS.items():
            config = replace(_config(folder, _device(context)), **options)
            yield from context.try_finding(
                label, lambda label=label, config=config: _same(label, config, asked, known)
            )
        config = _config(folder, _device(context))
        yield from context.try_finding("penalties", lambda: _same("penalties", config, mixed, known_mixed))
        yield from _narrow(context, folder, asked)


def requests(count: int, penalised: bool) -> list[EngineRequest]:
    """Draw requests with prompts of all lengths; with `penalised`, some draws need the tokens before them."""
    rng = random.Random(count)
    ways = (*_WAYS, _PENALISED) if penalised else _WAYS
    made: list[EngineRequest] = []
    for number in range(count):
        prompt = tuple(rng.randrange(3, small_model.VOCAB) for _ in range(rng.randint(1, 90)))
        params = SamplingParams(
            max_tokens=rng.randint(1, 28),
            seed=number,
            ignore_eos=True,
            n=1 + (number % 7 == 3),
            **ways[number % len(ways)],
        )
        made.append(EngineRequest(prompt, rng.choice([None, *small_model.RANKS]), params))
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


def _device(context: CheckContext) -> Device:
    return "cuda" if context.device.type == "cuda" else "cpu"


def _cpu(folder: Path) -> EngineConfig:
    return replace(_config(folder, "cpu"), unified_memory="off", attention_backend="torch")


def answer(config: EngineConfig, asked: Sequence[EngineRequest]) -> EngineAnswers:
    """Submit half of the requests at once, and the others one by one while those run."""
    engine = assemble(config)
    try:
        events = _run(engine, asked)
        return EngineAnswers(events, engine.core.live().preemptions)
    finally:
        engine.core.wait_for_step()
        engine.close()


def _run(engine: Engine, asked: Sequence[EngineRequest]) -> list[list[TokenEvent]]:
    waiting = list(enumerate(asked))[::-1]
    events: list[list[TokenEvent]] = [[] for _ in asked]
    adapters = _resolved(engine, asked)
    idle = 0
    for _ in range(max(1, len(asked) // 2)):
        _submit(engine, adapters, *waiting.pop())
    while waiting or engine.core.num_live_requests:
        result = engine.core.step()
        for failure in result.failures:
            raise failure.error
        for event in result.events:
            events[int(event.key.request_id)].append(event)
        if waiting:
            _submit(engine, adapters, *waiting.pop())
        elif result.idle:
            idle += 1
            assert idle < _MOST_IDLE, "the engine has requests and nothing to run"
            engine.wait_ready()
    return [sorted(each, key=lambda event: event.key.index) for each in events]


def _resolved(engine: Engine, asked: Sequence[EngineRequest]) -> dict[str | None, AdapterRef]:
    """Find the adapters while nothing runs: at its first use one is tried, which takes steps of its own."""
    resolve = engine.store.registry.resolve
    return {name: resolve(name) if name else BASE for name in dict.fromkeys(one.adapter for one in asked)}


def _submit(
    engine: Engine, adapters: Mapping[str | None, AdapterRef], number: int, one: EngineRequest
) -> None:
    request = Request(str(number), one.prompt, adapters[one.adapter], one.params, (), time.monotonic())
    engine.core.submit(request)


def _same(name: str, config: EngineConfig, asked: Sequence[EngineRequest], known: EngineAnswers) -> Finding:
    """Count the requests whose tokens differ from what is known."""
    found = answer(config, asked)
    differ = sum(one != other for one, other in zip(found.tokens, known.tokens, strict=True))
    tokens = sum(map(len, known.tokens))
    note = f"of {len(asked)}, {tokens} tokens, {found.preemptions} preemptions"
    return check(f"tokens, {name}", differ, 0, "requests differ", note)


def _narrow(context: CheckContext, folder: Path, asked: Sequence[EngineRequest]) -> Iterator[Finding]:
    """Compare bfloat16 with float32 by log-probabilities of prompts, and graphs with none."""
    scored = [
        replace(
            one,
            params=SamplingParams(max_tokens=1, temperature=0.0, seed=0, prompt_logprobs=0, ignore_eos=True),
        )
        for one in asked
        if len(one.prompt) > 1
    ]
    narrow = replace(_config(folder, _device(context)), dtype="bfloat16")

    def row() -> Finding:
        found, want = (_scores(answer(config, scored)) for config in (narrow, _cpu(folder)))
        return check("log-probabilities, bfloat16", relative_error(found, want), BF16_LIMIT, "rel. error")

    yield from context.try_finding("log-probabilities, bfloat16", row)

    def agreement() -> Finding:
        one, other = (answer(replace(narrow, cuda_graphs=on), asked).tokens for on in (True, False))
        same = sum(a == b for a, b in zip(one, other, strict=True))
        return measured("tokens, bfloat16", same / len(asked), "of requests alike", "with graphs and without")

    yield from context.try_finding("tokens, bfloat16", agreement)


def _scores(answered: EngineAnswers) -> torch.Tensor:
    return torch.tensor([each.logprob for events in answered.events for each in events[0].prompt_logprobs])
