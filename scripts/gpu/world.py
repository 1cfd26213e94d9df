"""World: the timed model with random weights, its K/V and the memory for adapters, made once; and its decode steps.

Everything a step reads is larger by far than a cache, so steps one after another find nothing there of the last.
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
from model.linear import Linear, make_linear
from model.llama import Llama
from model.sampling.sample import SampleRow
from model.weights import LayerWeights, Weights
from scripts.gpu import kernels_attention
from scripts.gpu.backends import Run
from scripts.gpu.inputs import flat_layout
from scripts.gpu.stand import Stand

BLOCK_SIZE = 16
RANKS = (8, 16, 32, 64, 128)
MIXES: dict[str, Callable[[int], list[int]]] = {
    "all 8": lambda count: [8] * count,
    "uniform 8..128": lambda count: [RANKS[number % len(RANKS)] for number in range(count)],
    "70/20/8/2 %": lambda count: _by_share(count),
    "all 128": lambda count: [128] * count,
    "31 of 8, one of 128": lambda count: [8] * (count - 1) + [128],
}
"""The ranks of so many adapters."""

_SHARES = ((8, 0.70), (16, 0.20), (64, 0.08), (128, 0.02))
_SPARE_TOKENS = 64  # that a sequence may draw while others' prompts are computed
_CHUNK_BYTES = 1 << 28


def _by_share(count: int) -> list[int]:
    """The largest first, at least one of each as far as they go."""
    ranks: list[int] = []
    for rank, share in reversed(_SHARES[1:]):
        ranks += [rank] * max(1, round(share * count))
    return ([8] * count + ranks)[-count:]


class World:
    """The timed model on the stand's device; `attention_name` is whose attention it has."""

    def __init__(self, stand: Stand) -> None:
        sizes, backends = stand.sizes, stand.backends
        self.stand, self.config, self.dtype = stand, sizes.timed, sizes.weights_dtype
        self.base = self.config.base_shape()
        self._layouts = {rank: flat_layout(self.base, self.dtype, rank) for rank in RANKS}
        self.ops = backends.ops(self.config, self.dtype)
        self.attention_name, self.attention = self._best_attention()
        self.sampler = backends.sampler(256)
        self.weights = random_weights(stand, self.config, self.dtype)
        self.model = Llama(self.config, self.weights, self.attention, self.ops)
        self.max_len_tokens = sizes.context_tokens + sizes.decode_steps + _SPARE_TOKENS
        self.blocks_each = -(-self.max_len_tokens // BLOCK_SIZE)
        self.cache = KVCache(
            KVLayout.of(self.config, self.dtype, BLOCK_SIZE),
            sizes.widths[-1] * self.blocks_each,
            stand.device,
        )
        for layer in range(self.config.num_layers):
            for kept in self.cache.layer(layer):
                kept.normal_(generator=stand.generator)
        self.arena = self._arena()

    def _best_attention(self) -> tuple[str, GraphAttention]:
        makers = self.stand.backends.attentions(self.config, self.dtype)
        for name in sorted(makers):  # flashinfer before torch and triton
            maker = makers[name]
            if not isinstance(maker, str) and (attention := self._tried(maker)) is not None:
                return name, attention
        raise RuntimeError(f"no attention works here: {', '.join(makers)}")

    def _tried(self, make: Callable[[], GraphAttention]) -> GraphAttention | None:
        """The attention, if it can attend to a prompt and decode: a library may lack its compiled parts."""
        one = replace(self.config, num_layers=1, windows=(None,))
        try:
            attention = make()
            for parts in ([(0, 20)], [(3, 4)]):
                trial = kernels_attention.World(self.stand, one, self.dtype, parts)
                trial.attend(attention.plan(trial.batch(), trial.cache))
            self.stand.backends.synchronize()
        except Exception as error:  # noqa: BLE001 - whatever it raises, the next one is tried
            traceback.print_exception(error)
            return None
        return attention

    def _arena(self) -> Tensor:
        """Memory for the largest mix, full of small random numbers."""
        widths = self.stand.sizes.widths
        needed = [sum(map(self.nbytes, MIXES["uniform 8..128"](widths[-1])))]
        needed.append(sum(map(self.nbytes, MIXES["all 128"](widths[0]))))
        arena = torch.empty(max(needed), dtype=torch.uint8, device=self.stand.device)
        for chunk in arena.view(self.dtype).split(_CHUNK_BYTES):
            chunk.normal_(0.0, 0.01, generator=self.stand.generator)
        return arena

    def nbytes(self, rank: int) -> int:
        """Of an adapter of `rank`, every A and B once."""
        return self._layouts[rank].nbytes

    def layout(self, rank: int) -> PackedLayout:
        """Of an adapter of `rank` on all sites."""
        return self._layouts[rank]

    def adapters(self, ranks: Sequence[int]) -> list[AdapterWeights]:
        """Distinct adapters, one after another in the arena."""
        made, start = [], 0
        for number, rank in enumerate(ranks):
            rows = self.arena[start : start + self.nbytes(rank)]
            made.append(view(rows, self.layout(rank), f"{number}-of-{len(ranks)}-{rank}"))
            start += self.nbytes(rank)
        return made


def random_weights(stand: Stand, config: ModelConfig, dtype: torch.dtype) -> Weights:
    """Of such a size that activations stay of order one."""

    def draw(*shape: int) -> Tensor:
        made = torch.empty(shape, dtype=dtype, device=stand.device)
        return made.normal_(0.0, 1 / math.sqrt(shape[-1]), generator=stand.generator)

    def linear(outputs: int, inputs: int) -> Linear:
        return make_linear(draw(outputs, inputs))

    def ones() -> Tensor:
        return torch.ones(config.hidden_size, dtype=dtype, device=stand.device)

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


class Decode:
    """Decode steps of `width` sequences, each at the end of its context, in graphs."""

    def __init__(self, world: World, width: int) -> None:
        self._world, self._width = world, width
        device, tokens = world.stand.device, world.stand.sizes.context_tokens
        each = -(-tokens // BLOCK_SIZE)
        dealt = torch.randperm(width * each, device=device, generator=world.stand.generator)
        self._tables = dealt.view(width, each)
        self._positions = torch.full((width,), tokens - 1, device=device)
        self._slots = self._tables[:, -1] * BLOCK_SIZE + (tokens - 1) % BLOCK_SIZE
        ids = torch.randint(world.config.vocab_size, (width,), device=device, generator=world.stand.generator)
        self._token_ids, self._every_row = ids, torch.arange(width, device=device)
        self._attention = world.attention.reserve(width, each, world.cache)
        self._graphs: dict[Hashable, Run] = {}

    def table(self, adapters: Sequence[AdapterWeights]) -> SegmentTable:
        """Each sequence its own adapter."""
        return SegmentTable(tuple(Segment(row, row + 1, one) for row, one in enumerate(adapters)))

    @torch.inference_mode()
    def load(self, table: SegmentTable) -> Run:
        """A step under the table's adapters, to be run until another is loaded."""
        batch = self.batch(table)
        key = self._world.ops.load(batch)
        self._attention.refill(batch)
        if key not in self._graphs:
            rows = [SampleRow(temperature=0.8, seed=row) for row in range(self._width)]
            self._world.sampler.refill(rows)
            self._graphs[key] = self._world.stand.backends.record(lambda: self.compute(batch))
        return self._graphs[key]

    @torch.inference_mode()
    def compute(self, batch: ForwardBatch) -> None:
        """The step itself."""
        logits = self._world.model.forward(batch, self._world.cache, self._attention)
        self._world.sampler.draw(logits, advance=True)

    def batch(self, table: SegmentTable) -> ForwardBatch:
        """The step's rows."""
        tokens = self._world.stand.sizes.context_tokens
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
