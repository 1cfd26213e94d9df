"""One simulated node: the real step scheduler and the real agent, a cost model in place of the executor."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Protocol

from lora.adapter import AdapterRef
from scheduler.cluster.cost.learnt import LearntCost
from scheduler.cluster.cost.model import AdapterLoad, StepLoad, load_of
from scheduler.cluster.protocol.agent import Action as AgentAction
from scheduler.cluster.protocol.agent import Depart, Fetch, Free, NodeAgent
from scheduler.cluster.protocol.messages import Command, Report
from scheduler.cluster.routing.base import NodeLoad
from scheduler.limits import MOST_ROWS, RequestRefused
from scheduler.plan import SliceOutput, StepPlan
from scheduler.request import Request
from scheduler.sim.clock import Clock
from scheduler.sim.memory.store import AdapterMemory, SimStore, Transfer
from scheduler.sim.spec import NodeSpec
from scheduler.sim.true_costs import TrueCosts
from scheduler.step import StepScheduler
from scheduler.step_budget import StepBudget
from scheduler.unified_pool import UnifiedPool

_PREFETCH_DEPTH = 8  # as the engine's
_LEARNT_FROM = 4  # one step in so many: to learn from each would take as long as to plan it
_DRAWN, _READ = SliceOutput(1), SliceOutput(None)


class Progress(Enum):
    """What a node tells a router about a request."""

    TOKEN = "token"
    DONE = "done"
    REFUSED = "refused"


News = tuple[str, Progress]
"""What there is to tell of a request, by the name under which it was sent."""


class Listener(Protocol):
    """Who sent a request, and hears of it. A router that starts anew is another one, of the same name."""

    name: str
    up: bool

    def hear(self, node: str, news: Sequence[News]) -> None:
        """Take in news of requests, in order."""
        ...

    def lose(self, node: str) -> None:
        """Note that the connection to the node broke, with what was under way on it."""
        ...


TellNews = Callable[["SimNode", Listener, Sequence[News]], None]


@dataclass(slots=True)
class _Job:
    """A request on this node, and whom to tell of it."""

    request: Request
    listener: Listener
    drawn_tokens: int = 0


class SimNode:
    """Runs what it is given, one step after another; `slowdown` is how many times longer its steps take than is
    their true cost. When it is not `up` any more, what the clock still has in store for it does nothing."""

    def __init__(
        self, agent: NodeAgent, spec: NodeSpec, clock: Clock, transfer: Transfer, tell: TellNews
    ) -> None:
        self.agent, self.spec = agent, spec
        self.up, self.draining, self.slowdown = True, False, 1.0
        split = spec.split()
        self._blocks = split.block_pool(spec.block_tokens)
        memory = AdapterMemory(spec.machine.memory_bytes, split.first_pages, spec.host_bytes)
        self.store = SimStore(agent, memory, spec.store, transfer, self._adapter_came)
        self._memory = UnifiedPool(split, self._blocks, self.store)
        self._clock, self._tell = clock, tell
        self._heard: dict[Listener, int] = {}  # the last request of each router
        self._loads_told = 0
        self._learnt = LearntCost((spec.model, *spec.others))
        self._costs = TrueCosts(spec.deviation, spec.model, agent.node)
        self._scheduler = StepScheduler(spec.limits, self._blocks)
        self._budget = StepBudget(spec.step_s, spec.limits.max_num_batched_tokens) if spec.step_s else None
        self._jobs: dict[str, _Job] = {}
        self._stepping = False
        self._planning = False
        self._due = False  # something changed since the last plan
        self.steps = self._steps_told = 0
        self.busy_s = 0.0

    @property
    def name(self) -> str:
        """Return the node's name in the cluster."""
        return self.agent.node

    @property
    def kv_tokens(self) -> int:
        """Return the tokens whose K/V the card has room for now."""
        return self._blocks.held_blocks * self.spec.block_tokens

    def submit(self, request: Request, listener: Listener, number: int = 0) -> None:
        """Run `request`, the `number`-th of its router, and tell how it goes; refuses what it has no room for."""
        adapter = request.adapter
        self._heard[listener] = max(number, self._heard.get(listener, 0))
        if self.draining or self._is_full(request) or not self.store.retain(adapter):
            self._tell(self, listener, [(request.request_id, Progress.REFUSED)])
            return
        try:
            self._scheduler.add(request)
        except RequestRefused:
            self.store.release(adapter)
            self._tell(self, listener, [(request.request_id, Progress.REFUSED)])
            return
        self._jobs[request.request_id] = _Job(request, listener)
        self.agent.took(adapter, len(request.prompt_token_ids))
        self.store.prefetch(self._scheduler.wanted(_PREFETCH_DEPTH))
        self._step()

    def abort(self, request_id: str) -> None:
        """Stop working on a request that nobody waits for; nothing happens if it has ended."""
        job = self._jobs.pop(request_id, None)
        if job is not None:
            self._scheduler.abort(request_id)
            self.store.release(job.request.adapter)
            self._step()

    def obey(self, command: Command) -> bool:
        """Do what the coordinator says; True if it says that the node may go."""
        actions = self.agent.receive(command)
        done = [self._do(action) for action in actions]
        self._give_up_hopeless()
        self._step()
        return any(done)

    def report(self) -> Report:
        """Return the next report to the coordinator."""
        self._rest_if_idle()
        return self.agent.report(self._learnt.slowdown, self.store.cached())

    def load(self) -> NodeLoad:
        """Return what routers are told of this node's load, but for what it heard from each (see `load_for`)."""
        self._loads_told += 1
        prompts: dict[AdapterRef, int] = {}
        decoding: dict[AdapterRef, int] = {}
        context = 0
        for job in self._jobs.values():
            ref, tokens = job.request.adapter, len(job.request.prompt_token_ids)
            prompts.setdefault(ref, 0)
            if job.drawn_tokens:
                decoding[ref] = decoding.get(ref, 0) + 1
                context += tokens + job.drawn_tokens
            else:
                prompts[ref] += tokens
        parts = (AdapterLoad(ref.rank, tokens, decoding.get(ref, 0)) for ref, tokens in prompts.items())
        digests = frozenset(ref.digest for ref in prompts)
        return NodeLoad(
            len(self._jobs),
            StepLoad(tuple(parts), context),
            digests,
            self.store.room_bytes,
            number=(self.agent.session << 32) + self._loads_told,
            draining=self.draining,
            step_rows=self._budget and self._budget.rows,
            seats=self.spec.limits.most_running,
            kv_tokens=self.kv_tokens,
            kernel=self._learnt.kernel,
            pace=self._learnt.pace.rounded(),
        )

    def load_for(self, router: Listener, load: NodeLoad) -> NodeLoad:
        """Return `load` as that router is told."""
        return replace(load, heard=self._heard.get(router, 0))

    def _rest_if_idle(self) -> None:
        """Let what was learnt of the pace fade while no step runs."""
        if self.steps == self._steps_told:
            self._learnt.rest()
        self._steps_told = self.steps

    def jobs(self) -> list[str]:
        """Return the requests being worked on."""
        return list(self._jobs)

    def check(self) -> None:
        """Check what must hold after every event: memory within its limit; no request forgotten or at a
        standstill."""
        name = self.name
        self.store.check()
        kv_bytes = self.kv_tokens * self.spec.kv_token_bytes
        assert kv_bytes + self.store.page_bytes <= self.spec.memory_bytes, (
            f"{name} holds more than its card has"
        )
        for request_id, job in self._jobs.items():
            ref = job.request.adapter
            assert self._scheduler.is_live(request_id), f"{request_id} is lost on {name}"
            assert self.store.is_retained(ref), f"{request_id} on {name} does not hold on to {ref.name}"
        goes_on = self._stepping or self.store.is_fetching
        assert goes_on or not self._jobs, f"{name} has work and does nothing"

    def _is_full(self, request: Request) -> bool:
        return self._scheduler.live().waiting + request.params.n > self.spec.max_waiting

    def _do(self, action: AgentAction) -> bool:
        match action:
            case Fetch(adapter=adapter, sources=sources):
                self.store.pull(adapter, sources)
            case Free(adapter=adapter):
                self.store.drop(adapter)
            case Depart():
                return True
        return False

    def _adapter_came(self) -> None:
        if self.up:
            self._give_up_hopeless()
            self._step()

    def _give_up_hopeless(self) -> None:
        """Refuse the requests whose adapter can have no room here any more."""
        for ref in self.store.hopeless():
            lost = [job for job in self._jobs.values() if job.request.adapter == ref]
            for job in lost:
                self.abort(job.request.request_id)
                self._tell(self, job.listener, [(job.request.request_id, Progress.REFUSED)])

    def _step(self) -> None:
        """Begin the next step, unless one runs or nothing can. Empty steps go by until nothing more comes of them."""
        self._due = True
        while self._due and self.up and not (self._stepping or self._planning):
            self._due = False
            self._planning = True
            self._plan()
            self._planning = False

    def _plan(self) -> None:
        """Plan a step and start what it holds; without a slice it only lets adapters, or K/V, make room."""
        if self._memory.must_move(short := self._scheduler.short_blocks()):
            self._memory.move(short)
        overdue = self._scheduler.overdue()
        if overdue is None:
            leaving = self.store.make_way(None, frozenset())
        else:
            leaving = self.store.make_way(overdue.adapter, overdue.running)
        rows = self._budget.rows if self._budget is not None else MOST_ROWS
        plan = self._scheduler.plan(self._clock.now, self.store.begin_step(), leaving, rows)
        if plan.slices:
            self.store.acquire(plan.adapters)
            self._start(plan)
        self.store.prefetch(self._scheduler.wanted(_PREFETCH_DEPTH))
        short = self._scheduler.short_blocks()
        if not plan.slices and (self.store.would_go_on() or self._memory.must_move(short)):
            self._due = True

    def _start(self, plan: StepPlan) -> None:
        load = load_of(plan)
        seconds = self._costs.step_s(load, self._clock.now) * self.slowdown
        if self._budget is not None:
            self._budget.ran(sum(part.prefill_tokens for part in load.adapters), seconds)
        if self.spec.learns and self.steps % _LEARNT_FROM == 0:
            self._learnt.observe(load, seconds)
        self._stepping = True
        self.steps += 1
        self.busy_s += seconds
        self._clock.after(seconds, lambda: self._complete(plan))

    def _complete(self, plan: StepPlan) -> None:
        """Commit the step that has run, and begin the next."""
        if not self.up:
            return
        self._stepping = False
        self.store.end_step(plan.adapters)
        outputs = [_DRAWN if part.samples else _READ for part in plan.slices]
        news: dict[Listener, list[News]] = {}
        for event in self._scheduler.commit(plan, outputs):
            name = event.key.request_id
            job = self._jobs[name]
            job.drawn_tokens += 1
            self.agent.took(job.request.adapter, 1)
            told = news.setdefault(job.listener, [])
            told.append((name, Progress.TOKEN))
            if event.finish_reason is not None:
                del self._jobs[name]
                self.store.release(job.request.adapter)
                told.append((name, Progress.DONE))
        for listener, told in news.items():
            self._tell(self, listener, told)
        self._give_up_hopeless()
        self._step()
