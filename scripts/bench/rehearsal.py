"""Rehearsals: steps of a live engine, made to order and timed.

A step's seconds are from the landing of the one before it to its own: what a node takes to decide, pin adapters,
compute, commit, and turn tokens into text. The n-th decoding sequence of an adapter always begins alike, so that
the prefix cache supplies most of its prompt after the first time; prompts that timed steps read are always new.
"""

import itertools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from statistics import fmean

from engine.build.assembly import Engine
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
class Landings:
    """The steps that have landed, and when."""

    clock: Callable[[], float] = time.perf_counter
    times: list[tuple[StepPlan, float]] = field(default_factory=list)

    def around(self, executor: StepExecutor) -> StepExecutor:
        """The executor, watched."""
        return _Watched(executor, self)


@dataclass(frozen=True, slots=True)
class _Watched:
    executor: StepExecutor
    landings: Landings

    def launch(self, plan: StepPlan, lease: AdapterLease) -> Computation:
        return _Landing(plan, self.executor.launch(plan, lease), self.landings)


@dataclass(frozen=True, slots=True)
class _Landing:
    plan: StepPlan
    computation: Computation
    landings: Landings

    @property
    def done(self) -> bool:
        return self.computation.done

    def outputs(self) -> StepOutputs:
        outputs = self.computation.outputs()
        self.landings.times.append((self.plan, self.landings.clock()))
        return outputs


@dataclass(frozen=True, slots=True)
class Part:
    """One sequence: its adapter, and its prompt's tokens."""

    adapter: AdapterRef
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Case:
    """What is rehearsed: steps in which all of `decoding` decode; then, if there are any, those in which the prompts
    of `reading` are read beside them."""

    decoding: tuple[Part, ...]
    reading: tuple[Part, ...] = ()


def draw_prompt(tokens: int, vocab_size: int, rng: Random) -> tuple[int, ...]:
    """Any tokens: what they say costs nothing."""
    return tuple(rng.choices(range(vocab_size), k=tokens))


class Unrehearsable(RuntimeError):
    """The engine did not get through a case."""


class Rehearsal:
    """Drives one engine, which nobody else uses meanwhile; `landings` watch its executor."""

    def __init__(self, engine: Engine, landings: Landings, seed: int) -> None:
        self._engine, self._landings = engine, landings
        self._fresh = Random(f"fresh/{seed}")
        self._answers: dict[str, RequestOutput] = {}
        self._silent: set[str] = set()  # of those, the ones that have not drawn
        self._names = map("rehearsal-{}".format, itertools.count())

    def warm(self, adapters: Sequence[AdapterRef]) -> None:
        """Make all of `adapters` resident, and run a prompt and a token of each."""
        self._begin([Part(ref, 8) for ref in adapters])
        self._abort()

    def measure(self, case: Case) -> list[Measurement]:
        """One for decoding, if anything does (the mean of some steps), and one for each step of reading."""
        rows: list[Measurement] = []
        if case.decoding:
            self._begin(case.decoding)
            self._timed(SETTLING_STEPS)
            rows.append(_middle(self._timed(TIMED_STEPS)))
        if case.reading:
            prompts = [(part, self._prompt(part, self._fresh)) for part in case.reading]
            for part, token_ids in prompts:
                self._submit(part, token_ids)
            rows += self._timed_until_all_have_drawn()
        self._abort()
        return rows

    def _begin(self, parts: Sequence[Part]) -> None:
        """Submit `parts` and run until each has drawn."""
        of_adapter: Counter[AdapterRef] = Counter()
        for part in parts:
            beginning = Random(f"{part.adapter.name}/{of_adapter[part.adapter]}")
            self._submit(part, self._prompt(part, beginning))
            of_adapter[part.adapter] += 1
        self._timed_until_all_have_drawn()

    def _timed_until_all_have_drawn(self) -> list[Measurement]:
        rows: list[Measurement] = []
        for _ in range(MOST_STEPS):
            if not self._silent:
                return rows
            rows += self._timed(1)
        raise Unrehearsable(f"{len(self._silent)} sequences drew nothing in {MOST_STEPS} steps")

    def _timed(self, steps: int) -> list[Measurement]:
        """Run until so many steps have landed; a step is over when its tokens are text."""
        landed, before_s = self._landings.times, self._landings.clock()
        rows: list[Measurement] = []
        for _ in range(MOST_STEPS):
            if len(rows) >= steps:
                return rows
            landed.clear()
            self._step()
            ends_s = [at_s for _, at_s in landed[:-1]] + [self._landings.clock()]
            for (plan, _), end_s in zip(landed, ends_s, strict=False):
                rows.append(Measurement(load_of(plan), end_s - before_s))
                before_s = end_s
        raise Unrehearsable(f"{len(rows)} of {steps} steps landed")

    def _step(self) -> None:
        result = self._engine.core.step()
        if result.failures:
            raise result.failures[0].error
        now_s = time.monotonic()
        for event in result.events:
            self._answers[event.key.request_id].push(event, now_s)
            self._silent.discard(event.key.request_id)
        if result.idle:
            self._engine.wait_ready()

    def _prompt(self, part: Part, rng: Random) -> tuple[int, ...]:
        return draw_prompt(part.prompt_tokens, self._engine.card.vocab_size, rng)

    def _submit(self, part: Part, token_ids: tuple[int, ...]) -> None:
        name = next(self._names)
        params = SamplingParams(max_tokens=None, temperature=0, ignore_eos=True, seed=0)
        request = Request(name, token_ids, part.adapter, params, (), time.monotonic())
        self._engine.core.submit(request)
        self._answers[name] = RequestOutput(request, self._engine.tokenizer, self._engine.core.abort)
        self._silent.add(name)

    def _abort(self) -> None:
        for name in self._answers:
            self._engine.core.abort(name)
        self._engine.core.wait_for_step()
        self._answers.clear()


def _middle(rows: Sequence[Measurement]) -> Measurement:
    """Of like steps: the load of the one in the middle, the mean of the seconds, since that is what serving waits."""
    return Measurement(rows[len(rows) // 2].load, fmean(row.step_s for row in rows))
