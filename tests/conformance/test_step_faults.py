"""Whatever computes the steps, a fault ends the requests that cause it and no others, and leaves nothing behind."""

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from engine import LLM, SamplingParams
from engine.errors import EngineError, StepFailed
from engine.runner import async_executor, executor
from engine.runner.base import Computation, StepExecutor, StepOutputs
from lora.adapter import BASE
from lora.segments import AdapterLease
from model.llama import Llama
from scheduler.plan import SequenceKey, Slice, StepPlan
from scheduler.request import Request
from tests.chance import examples
from tests.fakes.host_device import HostSampler, put_on_device
from tests.oracles.peft_model import write_llama

ADAPTERS = {"r5": 5, "r16": 16, "r64": 64}
BLOCK_BYTES = 16 * 3 * 2 * 2 * 16 * 4
MAX_STEPS = 2000
EXECUTORS: dict[str, Callable[[LLM], object]] = {
    "computed at once": lambda llm: None,
    "behind": lambda llm: put_on_device(llm, 16, 6),
}
STAGES = ("forward", "sampling", "reading")

Outcome = tuple[dict[SequenceKey, list[int | None]], dict[str, EngineError]]
"""Each sequence's tokens, and the requests that failed."""


class Fault(RuntimeError):
    """What is injected."""


@dataclass
class Faults:
    """Raises at one stage of every step in which a sequence computes a position from that in `positions` on."""

    stage: str = ""
    positions: Mapping[SequenceKey, int] = field(default_factory=dict[SequenceKey, int])
    at_fault: bool = False  # of the step that is being launched

    def launch(self, plan: StepPlan) -> bool:
        """Note the step that is launched, and return whether it is at fault."""
        self.at_fault = any(map(self._is_bad, plan.slices))
        return self.at_fault

    def strike(self, stage: str) -> None:
        """Raise if the step is at fault and this is its stage."""
        if self.at_fault and stage == self.stage:
            raise Fault(stage)

    def after(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Make the stage's function raise once it has done what it does."""

        def faulty(*arguments: Any, **named: Any) -> Any:
            result = function(*arguments, **named)
            self.strike(stage)
            return result

        return faulty

    def _is_bad(self, part: Slice) -> bool:
        return part.start + len(part.token_ids) > self.positions.get(part.key, 1 << 30)


@dataclass(frozen=True)
class FaultyReading:
    """Computation whose tokens cannot be read."""

    computation: Computation

    @property
    def done(self) -> bool:
        """As the computation within."""
        return self.computation.done

    def outputs(self) -> StepOutputs:
        """Wait as for others, and raise."""
        self.computation.outputs()
        raise Fault("reading")


@dataclass(frozen=True)
class FaultyExecutor:
    """StepExecutor by another, with faults."""

    executor: StepExecutor
    faults: Faults

    def launch(self, plan: StepPlan, lease: AdapterLease) -> Computation:
        """See StepExecutor."""
        at_fault = self.faults.launch(plan)
        computation = self.executor.launch(plan, lease)
        return FaultyReading(computation) if at_fault and self.faults.stage == "reading" else computation


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("faults"), ADAPTERS)


@pytest.fixture(scope="module", params=EXECUTORS)
def engine(folder: Path, request: pytest.FixtureRequest) -> Iterator[tuple[LLM, Faults]]:
    """An engine on each executor, with too few blocks for all, and the faults of its steps."""
    faults, options = Faults(), dict[str, Any](kv_cache_bytes=24 * BLOCK_BYTES, adapter_bytes=1 << 24)
    loras = {name: folder / name for name in ADAPTERS}
    llm = LLM(folder / "base", loras, dtype="float32", max_num_batched_tokens=48, **options)
    EXECUTORS[request.param](llm)
    llm.engine.core._executor = FaultyExecutor(llm.engine.core._executor, faults)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Llama, "forward", faults.after("forward", Llama.forward))
        patch.setattr(HostSampler, "draw", faults.after("sampling", HostSampler.draw))
        for module in (executor, async_executor):
            patch.setattr(module, "sample_step", faults.after("sampling", module.sample_step))
        yield llm, faults
    llm.close()


def _requests(llm: LLM, rng: random.Random) -> dict[str, Request]:
    """Draw requests: some share a prompt's beginning, some need each token before the next is planned."""
    shared = tuple(rng.randrange(4, 300) for _ in range(32))
    requests: dict[str, Request] = {}
    for number in range(rng.randint(2, 6)):
        own = tuple(rng.randrange(4, 300) for _ in range(rng.randint(1, 30)))
        adapter = rng.choice((None, *ADAPTERS))
        params = SamplingParams(
            n=rng.choice((1, 1, 2, 3)),
            max_tokens=rng.randint(1, 9),
            temperature=rng.choice((0.0, 0.9)),
            presence_penalty=rng.choice((0.0, 0.0, 0.0, 0.7)),
            logprobs=rng.choice((None, None, None, 1)),
            seed=number,
            ignore_eos=True,
        )
        ref = llm.engine.store.registry.resolve(adapter) if adapter else BASE
        prompt = shared[: rng.choice((0, 0, 20, 32))] + own
        requests[f"r{number}"] = Request(f"r{number}", prompt, ref, params, (), 0.0)
    return requests


def _run(llm: LLM, requests: Mapping[str, Request], rng: random.Random) -> Outcome:
    """Submit the requests, a few between one step and the next, and step until nothing lives."""
    core, waiting = llm.engine.core, list(requests.values())
    tokens: dict[SequenceKey, list[int | None]] = {}
    failed: dict[str, EngineError] = {}
    for _ in range(MAX_STEPS):
        while waiting and rng.random() < 0.7:
            core.submit(waiting.pop())
        if not waiting and not core.num_live_requests:
            return tokens, failed
        result = core.step()
        for event in result.events:
            tokens.setdefault(event.key, []).append(event.token_id)
        failed |= {failure.request_id: failure.error for failure in result.failures}
        if result.idle:
            llm.engine.wait_ready()
    raise AssertionError(f"still {core.live()} after {MAX_STEPS} steps")


def _bad(requests: Mapping[str, Request], rng: random.Random) -> dict[SequenceKey, int]:
    """Choose sequences, and for each the position at which it raises: in its prompt or among its answers."""
    keys = [SequenceKey(name, i) for name, one in requests.items() for i in range(one.params.n)]
    positions: dict[SequenceKey, int] = {}
    for key in rng.sample(keys, rng.choice((1, 1, 2, len(keys) // 2 + 1))):
        one = requests[key.request_id]
        prompt, last = len(one.prompt_token_ids), len(one.prompt_token_ids) + (one.params.max_tokens or 0) - 2
        positions[key] = rng.choice((rng.randrange(prompt), rng.randint(prompt - 1, last)))
    return positions


def _assert_clean(llm: LLM) -> None:
    """No sequence, no block and no pin of an adapter is left."""
    core, contents = llm.engine.core, llm.engine.store.contents
    assert (core.num_live_requests, core.block_stats().used) == (0, 0)
    assert not contents.retained()
    assert not any(content.leases for content in contents._residency.contents)


@pytest.mark.parametrize("seed", range(examples(6)))
def test_survivors_get_the_tokens_of_a_run_without_faults(engine: tuple[LLM, Faults], seed: int) -> None:
    llm, faults = engine
    stage, rng = STAGES[seed % len(STAGES)], random.Random(seed)
    requests = _requests(llm, rng)
    order = rng.random()
    expected, failed = _run(llm, requests, random.Random(order))
    assert not failed
    bad = _bad(requests, rng)
    faults.stage, faults.positions = stage, bad
    try:
        found, failed = _run(llm, requests, random.Random(order))
    finally:
        faults.positions = {}
    assert failed.keys() == {key.request_id for key in bad}
    assert all(isinstance(error, StepFailed) for error in failed.values())
    for key, tokens in expected.items():
        got = found.get(key, [])
        assert got == (tokens[: len(got)] if key.request_id in failed else tokens), key
    _assert_clean(llm)
