"""One simulated node: the real step scheduler and the real agent, a cost model in place of the executor."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from lora.adapter import AdapterRef
from scheduler.blocks import BlockPool
from scheduler.cluster.cost.model import AdapterLoad, CostModel, StepLoad, load_of
from scheduler.cluster.protocol.agent import Action as AgentAction
from scheduler.cluster.protocol.agent import Depart, Fetch, Free, NodeAgent
from scheduler.cluster.protocol.messages import Command, NodeHardware, Report
from scheduler.cluster.routing.base import NodeLoad
from scheduler.limits import RequestRefused, StepLimits
from scheduler.plan import SliceOutput, StepPlan
from scheduler.request import Request
from scheduler.sim.clock import Action, Clock
from scheduler.sim.store import SimStore, StoreSpec, Transfer
from scheduler.sim.true_costs import AS_PROFILED, Deviation, TrueCosts
from scheduler.step import StepScheduler

_PREFETCH_DEPTH = 8  # as the engine's
_DRAWN, _READ = SliceOutput(1), SliceOutput(None)


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """What a simulated node is made of. `model` is what policies are told that its steps cost, `deviation` how far
    they are from that."""

    machine: NodeHardware
    model: CostModel
    limits: StepLimits
    kv_blocks: int = 4096
    block_tokens: int = 64
    store: StoreSpec = field(default_factory=StoreSpec)
    deviation: Deviation = AS_PROFILED


class Progress(Enum):
    """What a node tells the front door about a request."""

    FIRST_TOKEN = "first token"
    DONE = "done"
    REFUSED = "refused"


Tell = Callable[[Progress], None]


def _unheard() -> None:
    """Do nothing: nobody asks for every token."""


@dataclass(slots=True)
class _Job:
    """A request on this node, and whom to tell of it."""

    request: Request
    tell: Tell
    on_token: Action
    drawn_tokens: int = 0


class SimNode:
    """Runs what it is given, one step after another; `slowdown` is how many times longer its steps take than is
    their true cost. When it is not `up` any more, what the clock still has in store for it does nothing."""

    def __init__(self, agent: NodeAgent, spec: NodeSpec, clock: Clock, transfer: Transfer) -> None:
        self.agent, self.spec = agent, spec
        self.up, self.slowdown = True, 1.0
        self.store = SimStore(agent, spec.machine.memory_bytes, spec.store, transfer, self._adapter_came)
        self._clock = clock
        self._costs = TrueCosts(spec.deviation, spec.model, agent.node)
        self._scheduler = StepScheduler(spec.limits, BlockPool(spec.kv_blocks, spec.block_tokens))
        self._jobs: dict[str, _Job] = {}
        self._stepping = False
        self._planning = False
        self._due = False  # something changed since the last plan
        self.steps = 0
        self.busy_s = 0.0

    @property
    def name(self) -> str:
        """Return the node's name in the cluster."""
        return self.agent.node

    def submit(self, request: Request, tell: Tell, on_token: Action = _unheard) -> None:
        """Run `request` and tell how it goes; refuses what it has no room for. `on_token` is called at each of its
        tokens, before what is told of that."""
        adapter = request.adapter
        if not self.store.retain(adapter):
            tell(Progress.REFUSED)
            return
        try:
            self._scheduler.add(request)
        except RequestRefused:
            self.store.release(adapter)
            tell(Progress.REFUSED)
            return
        self._jobs[request.request_id] = _Job(request, tell, on_token)
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
        return self.agent.report(self.slowdown, self.store.cached())

    def load(self) -> NodeLoad:
        """Return what front doors are told of this node's load."""
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
        return NodeLoad(len(self._jobs), StepLoad(tuple(parts), context), digests, self.store.room_bytes)

    def jobs(self) -> list[str]:
        """Return the requests being worked on."""
        return list(self._jobs)

    def check(self) -> None:
        """Check what must hold after every event: memory within its limit; no request forgotten or at a
        standstill."""
        name = self.name
        self.store.check()
        for request_id, job in self._jobs.items():
            ref = job.request.adapter
            assert self._scheduler.is_live(request_id), f"{request_id} is lost on {name}"
            assert self.store.is_retained(ref), f"{request_id} on {name} does not hold on to {ref.name}"
        goes_on = self._stepping or self.store.is_fetching
        assert goes_on or not self._jobs, f"{name} has work and does nothing"

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
                job.tell(Progress.REFUSED)

    def _step(self) -> None:
        """Begin the next step, unless one runs or nothing can. Empty steps go by until nothing more comes of them."""
        self._due = True
        while self._due and self.up and not (self._stepping or self._planning):
            self._due = False
            self._planning = True
            self._plan()
            self._planning = False

    def _plan(self) -> None:
        """Plan a step and start what it holds; without a slice it only lets adapters make room."""
        plan = self._scheduler.plan(self._clock.now, self.store.begin_step())
        if plan.slices:
            self.store.acquire(plan.adapters)
            self._start(plan)
        self.store.prefetch(self._scheduler.wanted(_PREFETCH_DEPTH))
        if not plan.slices and self.store.would_go_on():
            self._due = True

    def _start(self, plan: StepPlan) -> None:
        seconds = self._costs.step_s(load_of(plan), self._clock.now) * self.slowdown
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
        for event in self._scheduler.commit(plan, outputs):
            job = self._jobs[event.key.request_id]
            job.drawn_tokens += 1
            job.on_token()
            self.agent.took(job.request.adapter, 1)
            if job.drawn_tokens == 1:
                job.tell(Progress.FIRST_TOKEN)
            if event.finish_reason is not None:
                del self._jobs[event.key.request_id]
                self.store.release(job.request.adapter)
                job.tell(Progress.DONE)
        self._give_up_hopeless()
        self._step()
