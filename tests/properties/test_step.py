"""StepScheduler under any traffic: tokens are those of an undisturbed run, nothing leaks, all ends."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from lora.adapter import BASE, AdapterRef
from scheduler.limits import RequestRefused, StepLimits
from scheduler.plan import SequenceKey
from scheduler.request import Request, SamplingParams
from scheduler.tenant_turns import TenantTurns
from tests.chance import examples
from tests.scheduler.device import EOS, VOCABULARY, Oracle
from tests.scheduler.rig import ACTIVATED, ADAPTERS, Rig, request

MAX_MODEL_LEN = 26  # a prompt of 14 tokens and 12 more
SETTINGS = settings(
    deadline=None,
    derandomize=True,
    max_examples=examples(60),
    stateful_step_count=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)

# Prompts are prefixes of few texts, so that they share blocks or nearly do.
TEXTS = ((0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1), (0, 1, 2, 3, 1, 1, 1, 1, 1, 1, 1, 1), (3, 2, 1))
prompts = st.builds(lambda text, length: text[:length], st.sampled_from(TEXTS), st.integers(1, 14))
params = st.builds(
    SamplingParams,
    n=st.sampled_from((1, 1, 1, 2, 3)),
    max_tokens=st.one_of(st.none(), st.integers(2, 12)),
    min_tokens=st.integers(0, 2),
    presence_penalty=st.sampled_from((0.0, 0.0, 1.0)),
    seed=st.integers(0, 3),
    stop_token_ids=st.sampled_from(((), (), (0,))),
    ignore_eos=st.booleans(),
    prompt_logprobs=st.sampled_from((None, None, 0)),
)
EVERY = (*ADAPTERS, *ACTIVATED)
adapters = st.sampled_from((BASE, *EVERY))
limits = st.builds(
    StepLimits,
    max_num_seqs=st.integers(1, 5),
    max_num_batched_tokens=st.integers(1, 20),
    max_model_len=st.just(MAX_MODEL_LEN),
    adapter_patience_s=st.sampled_from((0.0, 3.0, 1e9)),
)


def most_steps(rig: Rig, requests: list[Request]) -> int:
    """A bound on the steps that `requests` take from nothing, when every adapter is ready.

    Every step computes a row. Rows are lost only by preemption; between two draws no sequence is preempted
    and admitted again, so that each row is computed at most once there; and there are as many draws as
    tokens.
    """
    drawn = rows = 0
    for one in requests:
        for index in range(one.params.n):
            tokens = len(Oracle.of(one, index, rig.limits.max_model_len).token_ids)
            drawn += tokens
            rows += len(one.prompt_token_ids) + tokens
    return (drawn + 1) * rows + 1


class Traffic(RuleBasedStateMachine):
    """Requests come, leave and lose their adapters; up to two steps are in flight."""

    @initialize(
        limits=limits,
        capacity_tokens=st.integers(12, 52),
        block_size=st.sampled_from((1, 2, 4)),
        has_turns=st.booleans(),
    )
    def start(self, limits: StepLimits, capacity_tokens: int, block_size: int, has_turns: bool) -> None:
        def make() -> Rig:
            turns = TenantTurns()
            if has_turns:
                turns.start()
            return Rig(limits, capacity_tokens // block_size, block_size, turns=turns)

        self.make = make
        self.rig: Rig = self.make()
        self.requests: dict[str, Request] = {}
        self.left: set[str] = set()
        self.script: list[tuple[str, Any]] = []

    def do(self, verb: str, what: Any = None) -> None:
        perform(self.rig, verb, what)
        self.script.append((verb, what))

    @rule(asked=st.lists(st.tuples(prompts, adapters, params), min_size=1, max_size=3))
    def add(self, asked: list[tuple[tuple[int, ...], AdapterRef, SamplingParams]]) -> None:
        for prompt, adapter, one_params in asked:
            one = request(f"r{len(self.requests)}", prompt, adapter, one_params)
            one = replace(one, tenant="ab"[len(self.requests) % 2])
            tokens = len(prompt) + one_params.max_tokens if one_params.max_tokens else MAX_MODEL_LEN
            if tokens <= min(MAX_MODEL_LEN, self.rig.pool.capacity_tokens + 1):
                self.do("add", one)
                self.requests[one.request_id] = one
            else:
                with pytest.raises(RequestRefused):
                    self.rig.add(one)

    @precondition(lambda self: self.rig.in_flight < 2)
    @rule()
    def plan(self) -> None:
        self.do("plan")

    @precondition(lambda self: self.rig.in_flight)
    @rule()
    def commit(self) -> None:
        self.do("commit")

    @precondition(lambda self: self.rig.in_flight)
    @rule()
    def fail(self) -> None:
        self.do("fail")

    @rule(resident=st.sets(st.sampled_from(EVERY)), count=st.integers(1, 12), depth=st.integers(0, 1))
    def run_steps(self, resident: set[AdapterRef], count: int, depth: int) -> None:
        """As an engine that commits a step when `depth` later ones are planned."""
        self.do("resident", {adapter.digest for adapter in resident})
        for _ in range(count):
            self.do("plan")
            while self.rig.in_flight > depth:
                self.do("commit")
            self.do("tick")

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.requests)))
        if data.draw(st.booleans()):
            self.do("abort", request_id)
        else:
            self.do("finish", SequenceKey(request_id, data.draw(st.integers(0, 2))))
        self.left.add(request_id)

    def teardown(self) -> None:
        if not self.requests:
            return
        self.rig.ready = {adapter.digest for adapter in EVERY}
        planned = len(self.rig.plans)
        self.rig.drain(most_steps(self.rig, list(self.requests.values())))
        for request_id, one in self.requests.items():
            self.rig.check(one, ended=request_id not in self.left)
        again = self.make()
        for verb, what in self.script:
            perform(again, verb, what)
        assert again.plans == self.rig.plans[:planned], "the same traffic was planned in two ways"


def perform(rig: Rig, verb: str, what: Any) -> None:
    """One operation of a script."""
    match verb:
        case "add":
            rig.add(what)
        case "plan":
            rig.plan()
        case "commit":
            rig.commit()
        case "fail":
            rig.fail()
        case "tick":
            rig.now += 1.0
        case "abort":
            rig.abort(what)
        case "finish":
            rig.finish(what)
        case "resident":
            rig.ready = what
        case _:
            raise AssertionError(verb)


TestTraffic = Traffic.TestCase
TestTraffic.settings = SETTINGS


@SETTINGS
@given(
    st.lists(st.tuples(prompts, adapters, params), min_size=2, max_size=8), limits, st.sampled_from((1, 2, 4))
)
def test_everything_ends_in_a_pool_that_holds_but_one_sequence(
    asked: list[tuple[tuple[int, ...], AdapterRef, SamplingParams]], limits: StepLimits, block_size: int
) -> None:
    rig = Rig(limits, num_blocks=-(-(MAX_MODEL_LEN - 1) // block_size), block_size=block_size)
    requests = [request(f"r{number}", *one) for number, one in enumerate(asked)]
    rig.add(*requests)
    rig.drain(most_steps(rig, requests))
    for one in requests:
        rig.check(one)


@SETTINGS
@given(
    st.lists(st.tuples(prompts, adapters, params), min_size=2, max_size=8),
    limits,
    st.lists(st.sets(st.sampled_from(EVERY)), min_size=20, max_size=40),
    st.integers(0, 1),
)
def test_tokens_survive_adapters_that_come_and_go_in_a_tight_pool_with_steps_in_flight(
    asked: list[tuple[tuple[int, ...], AdapterRef, SamplingParams]],
    limits: StepLimits,
    residents: list[set[AdapterRef]],
    depth: int,
) -> None:
    rig = Rig(limits, num_blocks=MAX_MODEL_LEN // 2, block_size=2)
    requests = [request(f"r{number}", *one) for number, one in enumerate(asked)]
    rig.add(*requests)
    for resident in residents:
        rig.ready = {adapter.digest for adapter in resident}
        rig.plan()
        while rig.in_flight > depth:
            rig.commit()
    rig.ready = {adapter.digest for adapter in EVERY}
    rig.drain(most_steps(rig, requests))
    for one in requests:
        rig.check(one)


@SETTINGS
@given(prompts, adapters, params.filter(lambda each: each.n == 1), st.data())
def test_a_stream_that_moves_at_any_token_goes_on_with_the_events_of_one_that_stayed(
    prompt: tuple[int, ...], adapter: AdapterRef, one_params: SamplingParams, data: st.DataObject
) -> None:
    one = request("r", prompt, adapter, one_params)
    here, there = (Rig(StepLimits(2, rows, MAX_MODEL_LEN), block_size=2) for rows in (3, 8))
    here.add(one)
    here.drain()
    whole = here.events[SequenceKey("r", 0)]
    drawn = tuple(event.token_id for event in whole if event.token_id is not None)
    assume(len(drawn) > 1)
    moved_after = data.draw(st.integers(1, len(drawn) - 1), "moved_after")
    there.add(replace(one, drawn_token_ids=drawn[:moved_after]))
    there.drain()
    assert there.events[SequenceKey("r", 0)] == whole[moved_after:]
    indices = [part.output_index for plan in there.plans for part in plan.slices if part.samples]
    assert indices == list(range(moved_after, len(drawn)))


class SmallStore:
    """Holds `slots` adapters, loads each in `load_steps` steps, and evicts only what the last step did not use.

    For what is overdue one leaves that no running sequence uses any more.
    """

    def __init__(self, rig: Rig, slots: int, load_steps: int) -> None:
        self._rig, self._slots, self._load_steps = rig, slots, load_steps
        self._arrives: dict[str, float] = {}
        self._window: str | None = None
        rig.ready.clear()

    def step(self) -> None:
        """Deliver what has arrived, run a step, and send for what it lacked."""
        for digest in [digest for digest, at in self._arrives.items() if at <= self._rig.now]:
            del self._arrives[digest]
            self._rig.ready.add(digest)
        self._rig.leaving = self._leaving()
        self._rig.step()
        for adapter in self._rig.scheduler.wanted(self._slots):
            if adapter.digest not in self._arrives and self._make_room():
                self._arrives[adapter.digest] = self._rig.now + self._load_steps

    def _leaving(self) -> set[str]:
        overdue, ready = self._rig.scheduler.overdue(), self._rig.ready
        here = ready | self._arrives.keys()
        if overdue is None or overdue.adapter.digest in here or len(ready) < self._slots:
            self._window = None
            return set()
        if self._window not in ready:
            self._window = min(ready)
        if self._window not in overdue.running:
            ready.remove(self._window)
            self._arrives[overdue.adapter.digest] = self._rig.now + self._load_steps
            return set()
        return {self._window}

    def _make_room(self) -> bool:
        used = {part.adapter.digest for part in self._rig.plans[-1].slices}
        if len(self._rig.ready) + len(self._arrives) < self._slots:
            return True
        idle = sorted(self._rig.ready - used)
        self._rig.ready -= set(idle[:1])
        return bool(idle)


@SETTINGS
@given(
    st.lists(st.tuples(prompts, adapters, params), min_size=2, max_size=8),
    limits,
    st.integers(1, 2),
    st.integers(0, 3),
)
def test_everything_ends_in_a_store_that_holds_fewer_adapters_than_are_asked_for(
    asked: list[tuple[tuple[int, ...], AdapterRef, SamplingParams]],
    limits: StepLimits,
    slots: int,
    load_steps: int,
) -> None:
    rig = Rig(limits, num_blocks=24, block_size=2)
    requests = [request(f"r{number}", *one) for number, one in enumerate(asked)]
    rig.add(*requests)
    store = SmallStore(rig, slots, load_steps)
    for _ in range(most_steps(rig, requests) + sum(one.params.n for one in requests) * (load_steps + 1)):
        if rig.has_work():
            store.step()
    assert not rig.has_work()
    for one in requests:
        rig.check(one)


def test_the_oracle_tells_adapters_and_prefixes_apart() -> None:
    """Guard of the tests above: were the simulated tokens alike, they would prove nothing."""
    long = SamplingParams(max_tokens=12, ignore_eos=True, seed=0)
    runs = {
        Oracle.of(request("r", prompt, adapter, long), 0, 64).token_ids
        for prompt in (TEXTS[0][:8], TEXTS[1][:8])
        for adapter in (BASE, *ADAPTERS)
    }
    assert len(runs) == 8
    assert {token for run in runs for token in run} == set(range(VOCABULARY))
    assert EOS in range(VOCABULARY)
