"""Rig: a StepScheduler on a simulated device, audited after every operation; and a short way to a request."""

from collections import deque
from collections.abc import Iterable, Sequence

from lora.adapter import BASE, AdapterRef
from scheduler.blocks import BlockPool
from scheduler.limits import StepLimits
from scheduler.plan import PENDING, SequenceKey, SliceOutput, StepPlan, TokenEvent
from scheduler.request import Request, SamplingParams
from scheduler.step import StepScheduler
from scheduler.tenant_turns import TenantTurns
from tests.scheduler.audit import audit_plan, audit_scheduler
from tests.scheduler.device import EOS, Device, Oracle, Tape

ADAPTERS = tuple(
    AdapterRef(digest=f"{i:02x}", name=f"adapter-{i}", rank=8, sites=("q_proj",), nbytes=1) for i in (1, 2, 3)
)
ACTIVATED = tuple(
    AdapterRef(f"a{i}", f"activated-{i}", 8, ("q_proj",), 1, invocation)
    for i, invocation in ((1, (1,)), (2, (2, 3)))
)


def request(
    request_id: str,
    prompt: Iterable[int],
    adapter: AdapterRef = BASE,
    params: SamplingParams | None = None,
) -> Request:
    """A request that draws 4 tokens and does not stop at EOS, unless told otherwise."""
    return Request(
        request_id=request_id,
        prompt_token_ids=tuple(prompt),
        adapter=adapter,
        params=params or SamplingParams(max_tokens=4, ignore_eos=True, seed=0),
        eos_token_ids=(EOS,),
        arrival_s=0.0,
    )


class Rig:
    """Drives a scheduler as an engine would, and remembers what each sequence yielded."""

    def __init__(
        self,
        limits: StepLimits,
        num_blocks: int = 64,
        block_size: int = 4,
        device: Device | Tape | None = None,
        turns: TenantTurns | None = None,
    ) -> None:
        self.limits = limits
        self.pool = BlockPool(num_blocks, block_size)
        self.scheduler = StepScheduler(limits, self.pool, turns)
        self.device = device or Device(block_size)
        self.ready = {adapter.digest for adapter in (*ADAPTERS, *ACTIVATED)}
        self.leaving: set[str] = set()
        self.now = 0.0
        self.plans: list[StepPlan] = []
        self.events: dict[SequenceKey, list[TokenEvent]] = {}
        self._in_flight: deque[tuple[StepPlan, Sequence[SliceOutput]]] = deque()

    @property
    def in_flight(self) -> int:
        """Steps planned and not committed."""
        return len(self._in_flight)

    def add(self, *requests: Request) -> None:
        """Add requests."""
        for one in requests:
            self.scheduler.add(one)
            for index in range(one.params.n):
                self.events[SequenceKey(one.request_id, index)] = []
        self.audit()

    def plan(self) -> StepPlan:
        """Plan a step and have the device run it; its commit is still to come."""
        before = self.scheduler.live().preemptions
        plan = self.scheduler.plan(self.now, frozenset(self.ready), frozenset(self.leaving))
        self.audit()
        if not self._in_flight:
            assert plan.slices or self.scheduler.live().preemptions == before, "preempted for nothing"
        audit_plan(plan, self.pool, self.limits)
        self.plans.append(plan)
        self._in_flight.append((plan, self.device.run(plan)))
        return plan

    def commit(self) -> tuple[TokenEvent, ...]:
        """Commit the oldest step in flight."""
        events = self.scheduler.commit(*self._in_flight.popleft())
        for event in events:
            self.events[event.key].append(event)
        self.audit()
        return events

    def fail(self) -> tuple[TokenEvent, ...]:
        """Fail the oldest step in flight, and with it those after it; run it again and commit it."""
        assert isinstance(self.device, Device)
        for plan, _ in self._in_flight:
            self.device.spoil(plan)
        failed = self._in_flight[0][0]
        awaited = {part.key for part in self.scheduler.awaited(failed)}
        plan = self.scheduler.retry(failed)
        self.audit()
        audit_plan(plan, self.pool, self.limits)
        assert {part.key for part in plan.slices} == awaited
        assert not any(PENDING in part.token_ids for part in plan.slices)
        self.plans.append(plan)
        self._in_flight.clear()
        self._in_flight.append((plan, self.device.run(plan)))
        return self.commit()

    def step(self) -> StepPlan:
        """Plan, run and commit, and let a second pass."""
        plan = self.plan()
        self.commit()
        self.now += 1.0
        return plan

    def steps(self, count: int) -> list[StepPlan]:
        """Several steps."""
        return [self.step() for _ in range(count)]

    def has_work(self) -> bool:
        """Whether any sequence lives."""
        live = self.scheduler.live()
        return live.waiting + live.running > 0

    def drain(self, most_steps: int = 10_000) -> int:
        """Step until nothing lives; the number of steps it took."""
        while self._in_flight:
            self.commit()
        for count in range(most_steps):
            if not self.has_work():
                assert self.pool.stats().used == 0, "blocks leaked"
                return count
            assert self.step().slices, "nothing runs although every adapter is ready"
        raise AssertionError(f"work is left after {most_steps} steps: {self.scheduler.live()}")

    def abort(self, request_id: str) -> None:
        """Abort a request."""
        self.scheduler.abort(request_id)
        self.audit()

    def finish(self, key: SequenceKey) -> None:
        """End a sequence as if a stop string had been found in its text."""
        self.scheduler.finish(key)
        self.audit()

    def tokens(self, request_id: str, index: int = 0) -> tuple[int | None, ...]:
        """The tokens that a sequence has yielded so far."""
        return tuple(event.token_id for event in self.events[SequenceKey(request_id, index)])

    def check(self, one: Request, *, ended: bool = True) -> None:
        """Each sequence yielded what it would have alone: all of it, or its start if it has not `ended`."""
        for index in range(one.params.n):
            oracle = Oracle.of(one, index, self.limits.max_model_len)
            events = self.events[SequenceKey(one.request_id, index)]
            assert [event.token_id for event in events] == list(oracle.token_ids[: len(events)])
            assert [event.logprob for event in events] == list(oracle.logprobs[: len(events)])
            reasons = [event.finish_reason for event in events]
            whole = len(events) == len(oracle.token_ids)
            assert whole or not ended
            assert reasons == [None] * (len(events) - 1) + [oracle.reason if whole else None] * bool(events)
            assert [event.prompt_logprobs for event in events[:1]] == [oracle.prompt_logprobs] * bool(events)
            assert not any(event.prompt_logprobs or event.cached_tokens for event in events[1:])

    def audit(self) -> None:
        """Check the scheduler's insides."""
        audit_scheduler(self.scheduler, self.pool, self.limits)
