"""A device on the CPU: as one that computes while the host goes on, and that replays what it has captured.

What is captured here is the function itself, so a replay computes anew. But it gets only what a replay on a device
would read: the memory that was filled, and what `load` and `refill` have written.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.llm import LLM
from engine.runner.async_executor import AsyncExecutor
from engine.runner.cuda_graphs import CudaGraphRunner, GraphParts
from engine.runner.executor import Executor
from lora.segments import SegmentTable
from model.attention.base import AttentionBackend, AttentionStep
from model.batch import ForwardBatch
from model.kv_cache import KVCache
from model.llama import Llama
from model.ops.base import LayerOps, LayerStep
from model.sampling.sample import InvalidLogits, SampleRow, sample


@dataclass
class LateTokens:
    """Tokens that have not arrived before they are asked for."""

    drawn: Tensor
    done: bool = False

    def tokens(self) -> tuple[list[int], list[int]]:
        """See DrawnTokens."""
        self.done = True
        tokens, sound = self.drawn.tolist()
        return tokens, [row for row, fine in enumerate(sound) if not fine]


class HostSampler:
    """StepSampler by `model.sampling.sample`. Its memory is poisoned where nothing was drawn."""

    def __init__(self, rows: int) -> None:
        self._rows: tuple[SampleRow, ...] = ()
        self._drawn = torch.full((2, rows), 1 << 40)

    @property
    def tokens(self) -> Tensor:
        """See StepSampler."""
        return self._drawn[0]

    def refill(self, rows: Sequence[SampleRow]) -> None:
        """See StepSampler."""
        self._rows = tuple(rows)

    def adjust(self, logits: Tensor, rows: Sequence[SampleRow]) -> None:
        """`draw` does that here."""
        assert tuple(rows) == self._rows

    def draw(self, logits: Tensor, advance: bool = False) -> Tensor:
        """See StepSampler."""
        for i, row in enumerate(self._rows[: len(logits)]):
            try:
                (drawn,) = sample(logits[i : i + 1], [row])
                self._drawn[:, i] = torch.tensor([drawn.token_id, 1])
            except InvalidLogits:
                self._drawn[:, i] = torch.tensor([0, 0])
        if advance:
            self._rows = tuple(replace(row, position=row.position + 1) for row in self._rows)
        return self.tokens[: len(logits)]

    def fetch(self, rows: int) -> LateTokens:
        """See StepSampler."""
        return LateTokens(self._drawn[:, :rows].clone())

    def snapshot(self) -> tuple[tuple[SampleRow, ...], Tensor]:
        """See StepSampler."""
        return self._rows, self._drawn.clone()

    def restore(self, state: tuple[tuple[SampleRow, ...], Tensor]) -> None:
        """See StepSampler."""
        self._rows = state[0]
        self._drawn.copy_(state[1])


class LoadedOps:
    """GraphOps over other ops: a plan over memory for which a step was loaded is made of that step."""

    def __init__(self, ops: LayerOps) -> None:
        self._ops = ops
        self._loaded: dict[int, SegmentTable] = {}  # by the address of the step's tokens

    def load(self, batch: ForwardBatch) -> Hashable:
        """See GraphOps."""
        self._loaded[batch.token_ids.data_ptr()] = batch.segments
        return bool(batch.segments.segments)

    def plan(self, batch: ForwardBatch, cache: KVCache) -> LayerStep:
        """See LayerOps."""
        segments = self._loaded.get(batch.token_ids.data_ptr(), batch.segments)
        return self._ops.plan(replace(batch, segments=segments), cache)


class LoadedAttention:
    """GraphAttention over another backend: a reserved step attends as it was last filled."""

    def __init__(self, backend: AttentionBackend) -> None:
        self._backend = backend

    def plan(self, batch: ForwardBatch, cache: KVCache) -> AttentionStep:
        """See AttentionBackend."""
        return self._backend.plan(batch, cache)

    def reserve(self, rows: int, blocks: int, cache: KVCache) -> "LoadedAttentionStep":
        """See GraphAttention."""
        return LoadedAttentionStep(self._backend, cache)


class LoadedAttentionStep:
    """ReservedStep."""

    def __init__(self, backend: AttentionBackend, cache: KVCache) -> None:
        self._backend, self._cache = backend, cache

    def refill(self, batch: ForwardBatch) -> None:
        """See ReservedStep."""
        self._rows = len(batch.query_lens)
        self._step = self._backend.plan(batch, self._cache)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See AttentionStep; rows beyond the step's are 0."""
        attended = self._step.attend(layer, q[: self._rows], k[: self._rows], v[: self._rows])
        out = torch.zeros(len(q), attended.shape[1], dtype=q.dtype)
        out[: self._rows] = attended
        return out


class CountedCapture:
    """Capture: runs a function as often as capturing on a device would, and counts captures and replays."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        self.captures += 1
        for _ in range(2):
            run()

        def replay() -> None:
            self.replays += 1
            run()

        return replay


def put_on_device(llm: LLM, rows: int, blocks: int) -> CountedCapture:
    """Run the engine's steps on this device from now on; return what captures its graphs.

    Graphs are those of up to `rows` sequences of up to `blocks` blocks.
    """
    executor = llm.engine.core._executor
    assert isinstance(executor, Executor)
    model, cache = executor._model, executor._cache
    assert isinstance(model, Llama)
    ops, attention = LoadedOps(model.ops), LoadedAttention(model.attention)
    model.ops, model.attention = ops, attention
    sampler, capture = HostSampler(256), CountedCapture()
    graphs = CudaGraphRunner(GraphParts(model, cache, ops, attention), sampler, rows, blocks, capture)
    llm.engine.core._executor = AsyncExecutor(model, cache, sampler, graphs)
    return capture
