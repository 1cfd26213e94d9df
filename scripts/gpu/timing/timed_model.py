"""The model that is timed: random weights, K/V and memory for adapters, made once; and its decode steps.

Everything that a step reads is larger by far than a cache, so that a step finds nothing there of the last
one.
"""

import math
import traceback
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lora.format.packed import PackedLayout, view
from lora.segments import AdapterWeights, Segment, SegmentTable
from model.attention.base import GraphAttention
from model.batch import ForwardBatch
from model.config import ModelConfig
from model.kv_cache import KVCache, KVLayout
from model.linear.base import Linear
from model.linear.choice import make_linear
from model.llama import Llama
from model.sampling.sample import SampleRow
from model.weights import LayerWeights, Weights
from scripts.gpu.backends.base import Run
from scripts.gpu.context import CheckContext
from scripts.gpu.correctness.attention import AttentionCase
from scripts.gpu.correctness.inputs import flat_layout

BLOCK_SIZE = 16
RANKS = (8, 16, 32, 64, 128)
MIXES: dict[str, Callable[[int], list[int]]] = {
    "all 8": lambda count: [8] * count,
    "uniform 8..128": lambda count: [RANKS[number % len(RANKS)] for number in range(count)],
    "70/20/8/2 %": lambda count: _by_share(count),
    "all 128": lambda count: [128] * count,
    "31 of 8, one of 128": lambda count: [8] * (count - 1) + [128],
}
"""How so many adapters divide into ranks."""

_SHARES = ((8, 0.70), (16, 0.20), (64, 0.08), (128, 0.02))
_SPARE_TOKENS = 64  # that a sequence may draw while others' prompts are computed
_CHUNK_BYTES = 1 << 28


def _by_share(count: int) -> list[int]:
    """Deal ranks by share, the largest first, at least one of each as far as they go."""
    ranks: list[int] = []
    for rank, share in reversed(_SHARES[1:]):
        ranks += [rank] * max(1, round(share * count))
    return ([8] * count + ranks)[-count:]


class TimedModel:
    """The timed model on the context's device; `attention_name` is whose attention it has."""

    def __init__(self, context: CheckContext) -> None:
        sizes, backends = context.sizes, context.backends
        self.context, self.config, self.dtype = context, sizes.timed, sizes.weights_dtype
        self.base = self.config.base_shape()
        self._layouts = {rank: flat_layout(self.base, self.dtype, rank) for rank in RANKS}
        self.ops = backends.ops(self.config, self.dtype)
        self.attention_name, self.attention = self._best_attention()
        self.sampler = backends.sampler(256)
        self.weights = random_weights(context, self.config, self.dtype)
        self.model = Llama(self.config, self.weights, self.attention, self.ops)
        self.max_len_tokens = sizes.context_tokens + sizes.decode_steps + _SPARE_TOKENS
        self.blocks_each = -(-self.max_len_tokens // BLOCK_SIZE)
        self.cache = KVCache(
            KVLayout.of(self.config, self.dtype, BLOCK_SIZE),
            sizes.widths[-1] * self.blocks_each,
            context.device,
        )
        for layer in range(self.config.num_layers):
            for kept in self.cache.layer(layer):
                kept.normal_(generator=context.generator)
        self.arena = self._arena()

    def _best_attention(self) -> tuple[str, GraphAttention]:
        makers = self.context.backends.attentions(self.config, self.dtype)
        for name in sorted(makers):  # flashinfer before torch and triton
            maker = makers[name]
            if not isinstance(maker, str) and (attention := self._tried(maker)) is not None:
                return name, attention
        raise RuntimeError(f"no attention works here: {', '.join(makers)}")

    def _tried(self, make: Callable[[], GraphAttention]) -> GraphAttention | None:
        """Try the attention on a prompt and on decode: a library may lack its compiled parts."""
        one = replace(self.config, num_layers=1, windows=(None,))
        try:
            attention = make()
            for parts in ([(0, 20)], [(3, 4)]):
                trial = AttentionCase(self.context, one, self.dtype, parts)
                trial.attend(attention.plan(trial.batch(), trial.cache))
            self.context.backends.synchronize()
        except Exception as error:  # noqa: BLE001 - whatever it raises, the next one is tried
            traceback.print_exception(error)
            return None
        return attention

    def _arena(self) -> Tensor:
        """Make memory for the largest mix, full of small random numbers."""
        widths = self.context.sizes.widths
        needed = [sum(map(self.nbytes, MIXES["uniform 8..128"](widths[-1])))]
        needed.append(sum(map(self.nbytes, MIXES["all 128"](widths[0]))))
        arena = torch.empty(max(needed), dtype=torch.uint8, device=self.context.device)
        for chunk in torch.split(arena.view(self.dtype), _CHUNK_BYTES):
            chunk.normal_(0.0, 0.01, generator=self.context.generator)
        return arena

    def nbytes(self, rank: int) -> int:
        """Compute the bytes of an adapter of `rank`, every A and B once."""
        return self._layouts[rank].nbytes

    def layout(self, rank: int) -> PackedLayout:
        """Give the layout of an adapter of `rank` on all sites."""
        return self._layouts[rank]

    def adapters(self, ranks: Sequence[int]) -> list[AdapterWeights]:
        """Make distinct adapters, one after another in the arena."""
        made, start = list[AdapterWeights](), 0
        for number, rank in enumerate(ranks):
            rows = self.arena[start : start + self.nbytes(rank)]
            made.append(view(rows, self.layout(rank), f"{number}-of-{len(ranks)}-{rank}"))
            start += self.nbytes(rank)
        return made


def random_weights(context: CheckContext, config: ModelConfig, dtype: torch.dtype) -> Weights:
    """Draw weights of such a size that activations stay of order one."""

    def draw(*shape: int) -> Tensor:
        made = torch.empty(shape, dtype=dtype, device=context.device)
        return made.normal_(0.0, 1 / math.sqrt(shape[-1]), generator=context.generator)

    def linear(outputs: int, inputs: int) -> Linear:
        return make_linear(draw(outputs, inputs))

    def ones() -> Tensor:
        return torch.ones(config.hidden_size, dtype=dtype, device=context.device)

    hidden, inner = config.hidden_size, config.intermediate_size
    layers = tuple(
        LayerWeights(
            input_norm=ones(),
            qkv=linear(config.q_size + 2 * config.kv_size, hidden),
            qk_norm=None,
            out=linear(hidden, config.q_size),
            post_norm=ones(),
            gate_up=linear(2 * inner, hidden),
            down=linear(hidden, inner),
        )
        for _ in range(config.num_layers)
    )
    return Weights(draw(config.vocab_size, hidden), layers, ones(), linear(config.vocab_size, hidden))


class DecodeSteps:
    """DecodeSteps steps of `width` sequences, each at the end of its context, in graphs."""

    def __init__(self, timed: TimedModel, width: int) -> None:
        self._timed, self._width = timed, width
        device, tokens = timed.context.device, timed.context.sizes.context_tokens
        each = -(-tokens // BLOCK_SIZE)
        dealt = torch.randperm(width * each, device=device, generator=timed.context.generator)
        self._tables = dealt.view(width, each)
        self._positions = torch.full((width,), tokens - 1, device=device)
        self._slots = self._tables[:, -1] * BLOCK_SIZE + (tokens - 1) % BLOCK_SIZE
        ids = torch.randint(
            timed.config.vocab_size, (width,), device=device, generator=timed.context.generator
        )
        self._token_ids, self._every_row = ids, torch.arange(width, device=device)
        self._attention = timed.attention.reserve(width, each, timed.cache)
        self._graphs: dict[Hashable, Run] = {}

    def table(self, adapters: Sequence[AdapterWeights]) -> SegmentTable:
        """Give each sequence its own adapter."""
        return SegmentTable(tuple(Segment(row, row + 1, one) for row, one in enumerate(adapters)))

    @torch.inference_mode()
    def load(self, table: SegmentTable) -> Run:
        """Load a step under the table's adapters; it can be run until another is loaded."""
        batch = self.batch(table)
        key = self._timed.ops.load(batch)
        self._attention.refill(batch)
        if key not in self._graphs:
            rows = [SampleRow(temperature=0.8, seed=row) for row in range(self._width)]
            self._timed.sampler.refill(rows)
            self._graphs[key] = self._timed.context.backends.record(lambda: self.compute(batch))
        return self._graphs[key]

    @torch.inference_mode()
    def compute(self, batch: ForwardBatch) -> None:
        """Compute the step itself."""
        logits = self._timed.model.forward(batch, self._timed.cache, self._attention)
        self._timed.sampler.draw(logits, advance=True)

    def batch(self, table: SegmentTable) -> ForwardBatch:
        """Make the step's batch."""
        tokens = self._timed.context.sizes.context_tokens
        return ForwardBatch(
            token_ids=self._token_ids,
            positions=self._positions,
            slots=self._slots,
            query_lens=(1,) * self._width,
            context_lens=(tokens,) * self._width,
            block_tables=self._tables,
            logit_rows=self._every_row,
            segments=table,
        )
