"""Time the engine's own loop over the timed model: prompts, decode, and the host's time per step.

Adapters are those of the timed model's arena, all resident, so that steps alone are timed.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import cast

import torch

from engine.assembly.executor_choice import make_executor
from engine.core import EngineCore
from engine.runner.base import Computation, StepExecutor, StepOutputs
from lora.adapter import BASE, AdapterRef
from lora.segments import AdapterLease, AdapterWeights
from lora.store.store import AdapterStore
from lora.target_modules import SITES
from scheduler.blocks import BlockPool
from scheduler.limits import StepLimits
from scheduler.plan import StepPlan
from scheduler.request import Request, SamplingParams
from scheduler.step import StepScheduler
from scripts.gpu.context import CheckContext
from scripts.gpu.finding import Finding, goal, measured, skipped
from scripts.gpu.timing.timed_model import BLOCK_SIZE, MIXES, TimedModel

HOST_GOAL_MS = 0.3
_LEAST_LEFT_S = 25.0
_SETTLING_STEPS = 4  # in which graphs are recorded


def findings(context: CheckContext) -> Iterator[Finding]:
    """Time as many sequences as the widest step has, under no, some, and as many adapters."""
    timed = context.once(TimedModel)
    executor = MeteredExecutor(_executor(timed))
    widest = context.sizes.widths[-1]
    for number, adapters in enumerate((0, *context.sizes.widths)):
        name = f"{adapters} adapters, {widest} sequences"
        if context.left_s < _LEAST_LEFT_S:
            yield skipped(name, f"{max(0, context.left_s):.0f} s are left")
            continue
        yield from ServingRun(timed, executor, adapters, f"run-{number}").findings(name)


def _executor(timed: TimedModel) -> StepExecutor:
    """Make the executor as an operator's engine has it."""
    context = timed.context
    widest = context.sizes.widths[-1]
    return make_executor(timed.model, timed.cache, not context.is_dry_run, widest, timed.blocks_each)


class ResidentAdapters:
    """What an EngineCore asks of its AdapterStore, with all adapters resident for good."""

    def __init__(self, weights: Mapping[str, AdapterWeights]) -> None:
        self._weights = weights

    def ready(self) -> frozenset[str]:
        """See AdapterStore."""
        return frozenset(self._weights)

    def make_way(self, ref: AdapterRef | None, running: frozenset[str]) -> frozenset[str]:
        """See AdapterStore."""
        return frozenset()

    def acquire(self, refs: Iterable[AdapterRef]) -> AdapterLease:
        """See AdapterStore."""
        return AdapterLease({ref.digest: self._weights[ref.digest] for ref in refs}, lambda: None)

    def failed(self) -> Mapping[str, Exception]:
        """See AdapterStore."""
        return {}

    def retain(self, ref: AdapterRef) -> None:
        """See AdapterStore."""

    def release(self, ref: AdapterRef) -> None:
        """See AdapterStore."""

    @property
    def loader(self) -> "ResidentAdapters":
        """Be the loader too, which has nothing to load."""
        return self

    def prefetch(self, refs: Iterable[AdapterRef]) -> None:
        """See AdapterLoader."""


@dataclass(frozen=True, slots=True)
class MeteredComputation:
    """A computation that adds up how long its reader waits."""

    computation: Computation
    meter: "MeteredExecutor"

    @property
    def done(self) -> bool:
        """See Computation."""
        return self.computation.done

    def outputs(self) -> StepOutputs:
        """See Computation."""
        began_s = time.perf_counter()
        outputs = self.computation.outputs()
        self.meter.waited_s += time.perf_counter() - began_s
        return outputs


class MeteredExecutor:
    """StepExecutor that adds up how long the host waited for outputs."""

    def __init__(self, executor: StepExecutor) -> None:
        self._executor = executor
        self.waited_s = 0.0
        self.launch_s = 0.0

    def launch(self, plan: StepPlan, lease: AdapterLease) -> MeteredComputation:
        """See StepExecutor."""
        began_s = time.perf_counter()
        computation = self._executor.launch(plan, lease)
        self.launch_s += time.perf_counter() - began_s
        return MeteredComputation(computation, self)


class ServingRun:
    """Runs prompts under so many adapters of uniform ranks from start to end."""

    def __init__(self, timed: TimedModel, executor: MeteredExecutor, adapters: int, label: str) -> None:
        sizes = timed.context.sizes
        self._timed, self._executor, self._label = timed, executor, label
        ranks = MIXES["uniform 8..128"](adapters)
        made = timed.adapters(ranks)
        self._refs = [
            AdapterRef(one.digest, one.digest, rank, SITES, timed.nbytes(rank))
            for one, rank in zip(made, ranks, strict=True)
        ]
        limits = StepLimits(sizes.widths[-1], sizes.prefill_rows, timed.max_len_tokens)
        self._core = EngineCore(
            StepScheduler(limits, BlockPool(timed.cache.num_blocks, BLOCK_SIZE)),
            cast(AdapterStore, ResidentAdapters({one.digest: one for one in made})),
            executor,
            time.monotonic,
            timed.config.vocab_size,
        )

    def findings(self, name: str) -> Iterator[Finding]:
        """Time prefill, then decode."""
        requests = self._submit()
        began_s = time.perf_counter()
        first: set[str] = set()
        while len(first) < len(requests):
            first |= self._step()
        prefill_s = time.perf_counter() - began_s
        prompt_tokens = sum(len(request.prompt_token_ids) for request in requests)
        yield measured(f"prefill, {name}", prompt_tokens / prefill_s, "tokens/s")
        for _ in range(_SETTLING_STEPS):
            self._step()
        yield from self._decode(name, len(requests))
        for request in requests:
            self._core.abort(request.request_id)
        self._core.wait_for_step()

    def _decode(self, name: str, width: int) -> Iterator[Finding]:
        host_ms, launch_ms, steps = list[float](), list[float](), self._timed.context.sizes.decode_steps
        began_s = time.perf_counter()
        for _ in range(steps):
            started_s, waited_s, launch_s = (
                time.perf_counter(),
                self._executor.waited_s,
                self._executor.launch_s,
            )
            self._step()
            took_s = time.perf_counter() - started_s
            host_ms.append(1e3 * (took_s - (self._executor.waited_s - waited_s)))
            launch_ms.append(1e3 * (self._executor.launch_s - launch_s))
        took_s = time.perf_counter() - began_s
        yield measured(f"decode, {name}", width * steps / took_s, "tokens/s", step_ms=1e3 * took_s / steps)
        yield goal(f"host, {name}", median(host_ms), HOST_GOAL_MS, "ms a step", launch_ms=median(launch_ms))

    def _step(self) -> set[str]:
        """Run a step; return the requests that got a token. Raises what ended one of them."""
        result = self._core.step()
        for failure in result.failures:
            raise failure.error
        assert not result.idle, "live requests always have something to run"
        return {event.key.request_id for event in result.events}

    def _submit(self) -> list[Request]:
        requests = self._requests()
        for request in requests:
            self._core.submit(request)
        return requests

    def _requests(self) -> list[Request]:
        sizes, generator = self._timed.context.sizes, torch.Generator().manual_seed(len(self._refs))
        shape = (sizes.widths[-1], sizes.context_tokens)
        prompts = torch.randint(self._timed.config.vocab_size, shape, generator=generator)
        most = self._timed.max_len_tokens - sizes.context_tokens
        return [
            Request(
                f"{self._label}-{number}",
                tuple(prompt),
                self._refs[number % len(self._refs)] if self._refs else BASE,
                SamplingParams(max_tokens=most, temperature=0.8, seed=number, ignore_eos=True),
                (),
                time.monotonic(),
            )
            for number, prompt in enumerate(prompts.numpy().tolist())
        ]
