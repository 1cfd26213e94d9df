"""Count what routers' requests are to a node, and tell it as the load that routing decides by."""

from collections.abc import Callable
from dataclasses import dataclass, field

from engine.core import EngineCore
from engine.runner.step_costs import StepCosts
from lora.adapter import AdapterRef
from scheduler.cluster.cost.model import AdapterLoad, StepLoad
from scheduler.cluster.routing.base import NodeLoad
from scheduler.request import Request


@dataclass(frozen=True, slots=True)
class NodeRoom:
    """What a node has room for: sequences that run and that may wait, and tokens of a K/V block."""

    seats: int
    most_waiting: int
    block_tokens: int


@dataclass(slots=True)
class _LinkedJob:
    """A request here: which sequences have not ended, and how many tokens each has drawn."""

    request: Request
    open: set[int]
    drawn: dict[int, int] = field(default_factory=dict[int, int])


class NodeJobs:
    """The requests of all routers that have not ended on this node. Used on one event loop."""

    def __init__(
        self,
        core: EngineCore,
        costs: StepCosts,
        room: NodeRoom,
        room_bytes: Callable[[], float],
        session: int,
    ) -> None:
        """Know none. `room_bytes` tells the memory that is neither kept for the plan nor needed by requests."""
        self._core, self._costs, self._room, self._room_bytes = core, costs, room, room_bytes
        self._jobs: dict[str, _LinkedJob] = {}
        self._session, self._told = session, 0

    def __len__(self) -> int:
        return len(self._jobs)

    def is_full(self, sequences: int) -> bool:
        """Return whether so many more sequences would be too many to wait."""
        return self._core.live().waiting + sequences > self._room.most_waiting

    def begin(self, request: Request) -> None:
        """Count a request that the node took."""
        self._jobs[request.request_id] = _LinkedJob(request, set(range(request.params.n)))

    def drew(self, request_id: str, index: int) -> AdapterRef:
        """Count a token of one sequence; return the adapter."""
        job = self._jobs[request_id]
        job.drawn[index] = job.drawn.get(index, len(job.request.drawn_token_ids)) + 1
        return job.request.adapter

    def ended(self, request_id: str, index: int) -> bool:
        """Note that one sequence has ended; return whether all have."""
        job = self._jobs.get(request_id)
        if job is None:
            return True
        job.open.discard(index)
        return not job.open

    def end(self, request_id: str) -> None:
        """Forget a request."""
        self._jobs.pop(request_id, None)

    def names_by_state(self) -> tuple[set[str], set[str]]:
        """Return the adapters under which tokens are drawn, and those under which some request has none yet."""
        running, waiting = set[str](), set[str]()
        for job in self._jobs.values():
            if not job.request.adapter.is_base:
                (running if job.drawn else waiting).add(job.request.adapter.name)
        return running, waiting

    def load(self, draining: bool) -> NodeLoad:
        """Return what routers are told, but for what was heard from each of them."""
        self._told += 1
        prompts: dict[AdapterRef, int] = {}
        decoding: dict[AdapterRef, int] = {}
        context = 0
        for job in self._jobs.values():
            ref, tokens = job.request.adapter, len(job.request.prompt_token_ids)
            prompts.setdefault(ref, 0)
            drawn = [job.drawn[index] for index in job.open if index in job.drawn]
            if drawn:
                decoding[ref] = decoding.get(ref, 0) + len(drawn)
                context += tokens * len(drawn) + sum(drawn)
            else:
                prompts[ref] += tokens + len(job.request.drawn_token_ids)
        parts = (AdapterLoad(ref.rank, tokens, decoding.get(ref, 0)) for ref, tokens in prompts.items())
        blocks = self._core.block_stats()
        return NodeLoad(
            requests=sum(len(job.open) for job in self._jobs.values()),
            work=StepLoad(tuple(parts), context),
            adapters=frozenset(ref.digest for ref in prompts),
            room_bytes=self._room_bytes(),
            number=(self._session << 20) + self._told,
            draining=draining,
            step_rows=self._costs.step_rows,
            seats=self._room.seats,
            kv_tokens=(blocks.used + blocks.cached + blocks.free) * self._room.block_tokens,
            kernel=self._costs.kernel,
            pace=self._costs.pace,
            waiting=self._core.live().waiting,
            kv_used_tokens=blocks.used * self._room.block_tokens,
        )
