"""Time steps of a live engine that are made to order.

A step's seconds are from the end of the one before it to its own: what a node takes to decide, pin adapters,
compute, commit, and turn tokens into text. The n-th decoding sequence of an adapter always begins alike, so
that the prefix cache supplies most of its prompt after the first time. Prompts that timed steps read are
always new.
"""

import itertools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from statistics import fmean

from engine.assembly.assembly import Engine
from engine.output import RequestOutput
from engine.runner.base import Computation, StepExecutor, StepOutputs
from lora.adapter import AdapterRef
from lora.segments import AdapterLease
from scheduler.cluster.cost.fit import Measurement
from scheduler.cluster.cost.model import load_of
from scheduler.plan import StepPlan
from scheduler.request import Request, SamplingParams

SETTLING_STEPS = 1
TIMED_STEPS = 5
MOST_STEPS = 2_000


@dataclass(slots=True)
class StepEnds:
    """The steps that have ended, and when."""

    clock: Callable[[], float] = time.perf_counter
    times: list[tuple[StepPlan, float]] = field(default_factory=list[tuple[StepPlan, float]])

    def around(self, executor: StepExecutor) -> StepExecutor:
        """Wrap the executor, so that the ends of its steps are recorded."""
        return _RecordingExecutor(executor, self)


@dataclass(frozen=True, slots=True)
class _RecordingExecutor:
    executor: StepExecutor
    ends: StepEnds

    def launch(self, plan: StepPlan, lease: AdapterLease) -> Computation:
        return _RecordingComputation(plan, self.executor.launch(plan, lease), self.ends)


@dataclass(frozen=True, slots=True)
class _RecordingComputation:
    plan: StepPlan
    computation: Computation
    ends: StepEnds

    @property
    def done(self) -> bool:
        return self.computation.done

    def outputs(self) -> StepOutputs:
        outputs = self.computation.outputs()
        self.ends.times.append((self.plan, self.ends.clock()))
        return outputs


@dataclass(frozen=True, slots=True)
class CaseSequence:
    """One sequence: its adapter, and its prompt's tokens."""

    adapter: AdapterRef
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class StepCase:
    """Steps to time: those in which all of `decoding` decode, then those that also read the prompts of `prefilling`."""

    decoding: tuple[CaseSequence, ...]
    prefilling: tuple[CaseSequence, ...] = ()


def draw_prompt(tokens: int, vocab_size: int, rng: Random) -> tuple[int, ...]:
    """Draw any tokens: what they say costs nothing."""
    return tuple(rng.choices(range(vocab_size), k=tokens))


class CaseNotFinished(RuntimeError):
    """The engine did not finish a case."""


class StepTimer:
    """Drives one engine, which nobody else uses meanwhile; `ends` records its executor's steps."""

    def __init__(self, engine: Engine, ends: StepEnds, seed: int) -> None:
        self._engine, self._ends = engine, ends
        self._fresh = Random(f"fresh/{seed}")
        self._outputs: dict[str, RequestOutput] = {}
        self._without_token: set[str] = set()  # of those, the ones that have drawn nothing
        self._names = map("timed-{}".format, itertools.count())

    def warm(self, adapters: Sequence[AdapterRef]) -> None:
        """Make all of `adapters` resident, and run a prompt and a token of each."""
        self._begin([CaseSequence(ref, 8) for ref in adapters])
        self._abort()

    def measure(self, case: StepCase) -> list[Measurement]:
        """Time a case: the mean of some steps that decode, if any does, and each step that prefills."""
        rows: list[Measurement] = []
        if case.decoding:
            self._begin(case.decoding)
            self._timed(SETTLING_STEPS)
            rows.append(_middle(self._timed(TIMED_STEPS)))
        if case.prefilling:
            prompts = [(sequence, self._prompt(sequence, self._fresh)) for sequence in case.prefilling]
            for sequence, token_ids in prompts:
                self._submit(sequence, token_ids)
            rows += self._timed_until_all_have_drawn()
        self._abort()
        return rows

    def _begin(self, sequences: Sequence[CaseSequence]) -> None:
        """Submit the sequences and run until each has drawn a token."""
        of_adapter: Counter[AdapterRef] = Counter()
        for sequence in sequences:
            beginning = Random(f"{sequence.adapter.name}/{of_adapter[sequence.adapter]}")
            self._submit(sequence, self._prompt(sequence, beginning))
            of_adapter[sequence.adapter] += 1
        self._timed_until_all_have_drawn()

    def _timed_until_all_have_drawn(self) -> list[Measurement]:
        rows: list[Measurement] = []
        for _ in range(MOST_STEPS):
            if not self._without_token:
                return rows
            rows += self._timed(1)
        raise CaseNotFinished(f"{len(self._without_token)} sequences drew nothing in {MOST_STEPS} steps")

    def _timed(self, steps: int) -> list[Measurement]:
        """Run until so many steps have ended; a step is over when its tokens are text."""
        ended, before_s = self._ends.times, self._ends.clock()
        rows: list[Measurement] = []
        for _ in range(MOST_STEPS):
            if len(rows) >= steps:
                return rows
            ended.clear()
            self._step()
            ends_s = [at_s for _, at_s in ended[:-1]] + [self._ends.clock()]
            for (plan, _), end_s in zip(ended, ends_s, strict=False):
                rows.append(Measurement(load_of(plan), end_s - before_s))
                before_s = end_s
        raise CaseNotFinished(f"{len(rows)} of {steps} steps ended")

    def _step(self) -> None:
        result = self._engine.core.step()
        if result.failures:
            raise result.failures[0].error
        now_s = time.monotonic()
        for event in result.events:
            self._outputs[event.key.request_id].push(event, now_s)
            self._without_token.discard(event.key.request_id)
        if result.idle:
            self._engine.wait_ready()

    def _prompt(self, sequence: CaseSequence, rng: Random) -> tuple[int, ...]:
        return draw_prompt(sequence.prompt_tokens, self._engine.card.vocab_size, rng)

    def _submit(self, sequence: CaseSequence, token_ids: tuple[int, ...]) -> None:
        name = next(self._names)
        params = SamplingParams(max_tokens=None, temperature=0, ignore_eos=True, seed=0)
        request = Request(name, token_ids, sequence.adapter, params, (), time.monotonic())
        self._engine.core.submit(request)
        self._outputs[name] = RequestOutput(request, self._engine.tokenizer, self._engine.core.abort)
        self._without_token.add(name)

    def _abort(self) -> None:
        for name in self._outputs:
            self._engine.core.abort(name)
        self._engine.core.wait_for_step()
        self._outputs.clear()


def _middle(rows: Sequence[Measurement]) -> Measurement:
    """Reduce like steps to the load of the middle one and the mean of the seconds, which is what serving waits."""
    return Measurement(rows[len(rows) // 2].load, fmean(row.step_s for row in rows))
