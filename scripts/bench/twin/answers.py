"""Answer the same requests by a live node and by a simulated one.

The live node is the engine's asynchronous front in this process: its step loop in a thread of its own, its
answers as text on the event loop. HTTP is left out on both sides. The simulated node runs the same step
scheduler under the same limits on a virtual clock, with a cost model in place of the executor. All adapters
are resident on both.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.assembly.assembly import Engine
from engine.async_engine import AsyncEngine
from engine.metrics.telemetry import Telemetry
from lora.adapter import AdapterRef
from scheduler.cluster.cost.model import CostModel
from scheduler.cluster.protocol.agent import NodeAgent
from scheduler.cluster.protocol.messages import NodeHardware
from scheduler.cluster.state import OperatingPoints
from scheduler.request import Request, SamplingParams
from scheduler.sim.clock import Action, Clock
from scheduler.sim.memory.store import StoreSpec
from scheduler.sim.node import Listener, News, Progress, SimNode
from scheduler.sim.spec import NodeSpec
from scripts.profile_node.live_engine import NodeCapacity

PLENTY_BYTES = 1 << 50
_ANY_NUMBER = 1 << 30
FOREVER_S = 1e6  # by then a simulated node has answered all, or never will
LEAD_S = 0.2  # from when a live run is begun to its second 0


@dataclass(frozen=True, slots=True)
class TwinRequest:
    """One request to come, `at_s` seconds after the start."""

    at_s: float
    adapter: AdapterRef
    prompt_token_ids: tuple[int, ...]
    output_tokens: int

    @property
    def params(self) -> SamplingParams:
        """Draw greedily, exactly as many tokens as asked for."""
        return SamplingParams(max_tokens=self.output_tokens, temperature=0, ignore_eos=True, seed=0)


@dataclass(frozen=True, slots=True)
class TwinAnswer:
    """What a client saw: the time of each of its tokens, in seconds since the start."""

    request: TwinRequest
    token_times_s: tuple[float, ...]

    @property
    def ttft_s(self) -> float:
        """From when it was to be asked."""
        return self.token_times_s[0] - self.request.at_s

    @property
    def gaps_s(self) -> tuple[float, ...]:
        """Between each token and the next."""
        return tuple(b - a for a, b in zip(self.token_times_s, self.token_times_s[1:], strict=False))


async def answer_live(
    engine: Engine, requests: Sequence[TwinRequest], on_end: Callable[[], object]
) -> list[TwinAnswer]:
    """Ask a live node, which is closed afterwards; `on_end` is called as each request ends."""
    node = AsyncEngine(engine, Telemetry(), max_waiting=len(requests))
    await node.start()
    start_s = time.monotonic() + LEAD_S
    try:
        return await asyncio.gather(
            *(_ask(node, f"request-{at}", request, start_s, on_end) for at, request in enumerate(requests))
        )
    finally:
        await node.close()


async def _ask(
    node: AsyncEngine, name: str, request: TwinRequest, start_s: float, on_end: Callable[[], object]
) -> TwinAnswer:
    await asyncio.sleep(start_s + request.at_s - time.monotonic())
    model = node.model_name if request.adapter.is_base else request.adapter.name
    times_s: list[float] = []
    async for delta in await node.submit(model, request.prompt_token_ids, request.params, name):
        times_s += [time.monotonic() - start_s] * len(delta.token_ids)
    on_end()
    return TwinAnswer(request, tuple(times_s))


def answer_simulated(
    model: CostModel, capacity: NodeCapacity, requests: Sequence[TwinRequest]
) -> tuple[list[TwinAnswer], float]:
    """Ask a simulated node; also compute the part of the time that it is busy, up to the last token."""
    clock = Clock()
    machine = NodeHardware(PLENTY_BYTES, OperatingPoints((8,), (1.0,)))
    spec = _node(machine, model, capacity)
    node = SimNode(NodeAgent("twin", machine), spec, clock, _at_once, _tell_at_once)
    answers = [_Answer(f"client-{at}", clock) for at in range(len(requests))]
    for at, request in enumerate(requests):
        asked = _to_engine(f"request-{at}", request)
        clock.at(request.at_s, lambda asked=asked, answer=answers[at]: node.submit(asked, answer))
    clock.run(FOREVER_S)
    times_s = [answer.times_s for answer in answers]
    end_s = max(each[-1] for each in times_s)  # every request has drawn, or this raises
    return [
        TwinAnswer(request, tuple(each)) for request, each in zip(requests, times_s, strict=True)
    ], node.busy_s / end_s


def _node(machine: NodeHardware, model: CostModel, capacity: NodeCapacity) -> NodeSpec:
    """Describe the live node: so many K/V blocks, which adapters do not share; a token of them is taken for a page."""
    token_bytes = StoreSpec().page_bytes
    kv_bytes = capacity.kv_blocks * capacity.block_tokens * token_bytes
    return NodeSpec(
        machine,
        model,
        capacity.limits,
        memory_bytes=PLENTY_BYTES + kv_bytes,
        kv_token_bytes=token_bytes,
        block_tokens=capacity.block_tokens,
        unified=False,
        max_waiting=_ANY_NUMBER,
    )


def _to_engine(name: str, request: TwinRequest) -> Request:
    return Request(name, request.prompt_token_ids, request.adapter, request.params, (), request.at_s)


class _Answer:
    """Hears of one request: when its tokens came."""

    def __init__(self, name: str, clock: Clock) -> None:
        self.name, self.up, self.times_s = name, True, list[float]()
        self._clock = clock

    def hear(self, node: str, news: Sequence[News]) -> None:
        """Note the time of each token."""
        for name, progress in news:
            assert progress is not Progress.REFUSED, f"{name} was refused"
            if progress is Progress.TOKEN:
                self.times_s.append(self._clock.now)

    def lose(self, node: str) -> None:
        """Fail: nothing breaks here."""
        raise AssertionError(f"the connection to {node} broke")


def _tell_at_once(node: SimNode, listener: Listener, news: Sequence[News]) -> None:
    listener.hear(node.name, news)


def _at_once(adapter: AdapterRef, sources: Sequence[str], done: Action) -> None:
    done()
