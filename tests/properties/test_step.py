"""StepScheduler under any traffic: tokens are those of an undisturbed run, nothing leaks, all ends."""

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from lora.adapter import BASE
from scheduler.plan import SequenceKey
from scheduler.request import Request, SamplingParams
from scheduler.step import RequestRefused, StepLimits
from tests.scheduler.device import EOS, VOCABULARY, Oracle
from tests.scheduler.rig import ADAPTERS, Rig, request

MAX_MODEL_LEN = 26  # a prompt of 14 tokens and 12 more
SETTINGS = settings(
    deadline=None,
    derandomize=True,
    max_examples=120,
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
adapters = st.sampled_from((BASE, *ADAPTERS))
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

    @initialize(limits=limits, num_blocks=st.integers(12, 30), block_size=st.sampled_from((1, 2, 4)))
    def start(self, limits: StepLimits, num_blocks: int, block_size: int) -> None:
        self.make = lambda: Rig(limits, num_blocks * 2 // block_size + 1, block_size)
        self.rig = self.make()
        self.requests: dict[str, Request] = {}
        self.left: set[str] = set()
        self.in_flight = 0
        self.script: list[tuple[str, Any]] = []

    def do(self, verb: str, what: Any = None) -> None:
        self.script.append((verb, what))
        perform(self.rig, verb, what)

    @rule(prompt=prompts, adapter=adapters, params=params)
    def add(self, prompt: tuple[int, ...], adapter: Any, params: SamplingParams) -> None:
        one = request(f"r{len(self.requests)}", prompt, adapter, params)
        try:
            self.do("add", one)
        except RequestRefused:
            self.script.pop()
            longest = len(prompt) + params.max_tokens if params.max_tokens else MAX_MODEL_LEN
            assert longest > min(MAX_MODEL_LEN, self.rig.pool.capacity_tokens + 1)
        else:
            self.requests[one.request_id] = one

    @precondition(lambda self: self.in_flight < 2)
    @rule()
    def plan(self) -> None:
        self.do("plan")
        self.in_flight += 1

    @precondition(lambda self: self.in_flight)
    @rule()
    def commit(self) -> None:
        self.do("commit")
        self.in_flight -= 1

    @precondition(lambda self: not self.in_flight)
    @rule(count=st.integers(1, 8))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.do("step")

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.requests)))
        self.do("abort", request_id)
        self.left.add(request_id)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), index=st.integers(0, 2))
    def finish(self, data: st.DataObject, index: int) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.requests)))
        self.do("finish", SequenceKey(request_id, index))
        self.left.add(request_id)

    @rule(adapter=st.sampled_from(ADAPTERS))
    def abort_adapter(self, adapter: Any) -> None:
        self.do("abort_adapter", adapter.digest)
        self.left |= {name for name, one in self.requests.items() if one.adapter == adapter}

    @rule(adapter=st.sampled_from(ADAPTERS))
    def flap(self, adapter: Any) -> None:
        self.do("flap", adapter.digest)

    def teardown(self) -> None:
        if not hasattr(self, "rig"):
            return
        self.rig.ready = {adapter.digest for adapter in ADAPTERS}
        self.rig.drain(most_steps(self.rig, list(self.requests.values())))
        for request_id, one in self.requests.items():
            self.rig.check(one, ended=request_id not in self.left)
        again = self.make()
        for verb, what in self.script:
            perform(again, verb, what)
        assert again.plans == self.rig.plans[: len(again.plans)], "the same traffic was planned in two ways"


def perform(rig: Rig, verb: str, what: Any) -> None:
    """One operation of a script."""
    match verb:
        case "add":
            rig.add(what)
        case "plan":
            rig.plan()
        case "commit":
            rig.commit()
        case "step":
            rig.step()
        case "abort":
            rig.abort(what)
        case "finish":
            rig.finish(what)
        case "abort_adapter":
            rig.scheduler.abort_adapter(what)
            rig.audit()
        case "flap":
            rig.ready ^= {what}


TestTraffic = Traffic.TestCase
TestTraffic.settings = SETTINGS


@SETTINGS
@given(
    st.lists(st.tuples(prompts, adapters, params), min_size=2, max_size=8), limits, st.sampled_from((1, 2, 4))
)
def test_everything_ends_in_a_pool_that_holds_but_one_sequence(
    asked: list[tuple[tuple[int, ...], Any, SamplingParams]], limits: StepLimits, block_size: int
) -> None:
    rig = Rig(limits, num_blocks=-(-(MAX_MODEL_LEN - 1) // block_size), block_size=block_size)
    requests = [request(f"r{number}", *one) for number, one in enumerate(asked)]
    rig.add(*requests)
    rig.drain(most_steps(rig, requests))
    for one in requests:
        rig.check(one)


class SmallStore:
    """Holds `slots` adapters, loads each in `load_steps` steps, and evicts only what nothing running uses."""

    def __init__(self, rig: Rig, slots: int, load_steps: int) -> None:
        self._rig, self._slots, self._load_steps = rig, slots, load_steps
        self._arrives: dict[str, float] = {}
        rig.ready.clear()

    def step(self) -> None:
        """Deliver what has arrived, run a step, and send for what it lacked."""
        for digest in [digest for digest, at in self._arrives.items() if at <= self._rig.now]:
            del self._arrives[digest]
            self._rig.ready.add(digest)
        self._rig.step()
        for adapter in self._rig.scheduler.wanted(self._slots):
            if adapter.digest not in self._arrives and self._make_room():
                self._arrives[adapter.digest] = self._rig.now + self._load_steps

    def _make_room(self) -> bool:
        used = {adapter.digest for adapter in self._rig.scheduler.running_adapters()}
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
    asked: list[tuple[tuple[int, ...], Any, SamplingParams]], limits: StepLimits, slots: int, load_steps: int
) -> None:
    rig = Rig(limits, num_blocks=24, block_size=2)
    requests = [request(f"r{number}", *one) for number, one in enumerate(asked)]
    rig.add(*requests)
    store = SmallStore(rig, slots, load_steps)
    for _ in range(most_steps(rig, requests) + sum(one.params.n for one in requests) * (load_steps + 1)):
        if rig.scheduler.has_work():
            store.step()
    assert not rig.scheduler.has_work()
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
