"""What every attention backend must do, against a dense float32 reference written from the definition.

Triton's kernels run here on a CUDA device, or under TRITON_INTERPRET=1 in a process of their own. flashinfer's adapter
runs over a fake of the library that computes what it is told to.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora.segments import NO_SEGMENTS
from model.attention.base import AttentionBackend, AttentionStep, GraphAttention
from model.attention.flashinfer_paged import FlashInferAttention
from model.attention.native.native_paged import load_attend, native_paged
from model.attention.torch_paged import TorchPagedAttention
from model.attention.triton.backend import TritonPagedAttention
from model.batch import ForwardBatch
from model.config import ModelConfig, RopeConfig
from model.kv_cache import KVCache, KVLayout
from tests.chance import examples
from tests.fakes.flashinfer import FakeFlashInfer
from tests.kernels.interpreter import DEVICE, INTERPRETED, RUNS_TRITON


def flashinfer_over_a_fake(config: ModelConfig) -> FlashInferAttention:
    return FlashInferAttention(config, torch.device("cpu"), FakeFlashInfer())


GraphMakers = Mapping[str, Callable[[ModelConfig], GraphAttention]]
TRITON: GraphMakers = {"triton": TritonPagedAttention} if RUNS_TRITON else {}
FLASHINFER: GraphMakers = {} if RUNS_TRITON else {"flashinfer": flashinfer_over_a_fake}
ATTEND = load_attend()
NATIVE: Mapping[str, Callable[[ModelConfig], AttentionBackend]] = (
    {} if ATTEND is None else {"native": partial(native_paged, attend=ATTEND)}
)
GRAPH_BACKENDS: GraphMakers = {**TRITON, **FLASHINFER}
BACKENDS: Mapping[str, Callable[[ModelConfig], AttentionBackend]] = {
    **({} if INTERPRETED else {"torch": TorchPagedAttention, **NATIVE}),
    **GRAPH_BACKENDS,
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(params=list(BACKENDS))
def make_backend(request: pytest.FixtureRequest) -> Callable[[ModelConfig], AttentionBackend]:
    return BACKENDS[request.param]


@pytest.fixture(params=list(GRAPH_BACKENDS))
def make_graph_backend(request: pytest.FixtureRequest) -> Callable[[ModelConfig], GraphAttention]:
    return GRAPH_BACKENDS[request.param]


@dataclass(frozen=True)
class Geometry:
    """Heads, sizes and windows of the case; one layer for each window."""

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    block_size: int = 16
    windows: tuple[int | None, ...] = (None,)
    dtype: torch.dtype = torch.float32

    def config(self) -> ModelConfig:
        return ModelConfig(
            architecture="LlamaForCausalLM",
            vocab_size=8,
            hidden_size=8,
            intermediate_size=8,
            num_layers=len(self.windows),
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            rms_norm_eps=1e-6,
            rope=RopeConfig("default", 10000.0, 1.0, 4096),
            windows=self.windows,
            qkv_bias=False,
            out_bias=False,
            mlp_bias=False,
            qk_norm=False,
            tied_embeddings=False,
            max_model_len=4096,
            dtype="bfloat16" if self.dtype == torch.bfloat16 else "float32",
            bos_token_id=None,
            eos_token_ids=(),
        )


class World:
    """Sequences with known K and V, and a cache that a backend fills step by step."""

    def __init__(
        self, backend: AttentionBackend, geometry: Geometry, lengths: Sequence[int], seed: int = 0
    ) -> None:
        self.backend, self.geometry = backend, geometry
        generator = torch.Generator().manual_seed(seed)
        blocks = [-(-length // geometry.block_size) for length in lengths]
        dealt = (torch.randperm(sum(blocks), generator=generator) + 1).split(blocks)
        self.tables = [table.tolist() for table in dealt]
        layout = KVLayout.of(geometry.config(), geometry.dtype, geometry.block_size)
        self.cache = KVCache(layout, sum(blocks) + 2, DEVICE)

        def rows(length: int, heads: int) -> Tensor:
            shape = (len(geometry.windows), length, heads, geometry.head_dim)
            return torch.randn(shape, generator=generator).to(DEVICE, geometry.dtype)

        self.q = [rows(length, geometry.heads) for length in lengths]
        self.k = [rows(length, geometry.kv_heads) for length in lengths]
        self.v = [rows(length, geometry.kv_heads) for length in lengths]

    def step(self, parts: Sequence[tuple[int, int, int]]) -> list[list[Tensor]]:
        """Run (sequence, start, stop) parts as one batch: each layer's output of each part, [rows, heads,
        dim]."""
        return self.attend(self.backend.plan(self.batch(parts), self.cache), parts)

    def attend(self, step: AttentionStep, parts: Sequence[tuple[int, int, int]]) -> list[list[Tensor]]:
        """The planned step's outputs, as of `step`."""
        self.store(parts)
        outs = []
        for layer in range(len(self.geometry.windows)):
            q, k, v = (torch.cat([x[s][layer, a:b] for s, a, b in parts]) for x in (self.q, self.k, self.v))
            out = step.attend(layer, q, k, v)
            assert out.is_contiguous()
            shaped = out.unflatten(1, (self.geometry.heads, self.geometry.head_dim))
            outs.append(list(shaped.split([b - a for _, a, b in parts])))
        return outs

    def store(self, parts: Sequence[tuple[int, int, int]]) -> None:
        """Write the parts' K and V to the cache without attending."""
        slots = self.batch(parts).slots
        for layer in range(len(self.geometry.windows)):
            k, v = (torch.cat([x[s][layer, a:b] for s, a, b in parts]) for x in (self.k, self.v))
            self.cache.write(layer, slots, k, v)

    def expected(self, layer: int, sequence: int, start: int, stop: int) -> Tensor:
        """softmax(q Kᵀ / sqrt(d)) V in float32 over all the positions that each row may see."""
        geometry = self.geometry
        group = geometry.heads // geometry.kv_heads
        q = self.q[sequence][layer, start:stop].float()
        k, v = (x[sequence][layer, :stop].float().repeat_interleave(group, dim=1) for x in (self.k, self.v))
        scores = torch.einsum("thd,shd->hts", q, k) / geometry.head_dim**0.5
        row = torch.arange(start, stop, device=DEVICE)[:, None]
        position = torch.arange(stop, device=DEVICE)
        hidden = position > row
        window = geometry.windows[layer]
        if window is not None:
            hidden |= position <= row - window
        return torch.einsum("hts,shd->thd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)

    def check(self, parts: Sequence[tuple[int, int, int]]) -> None:
        self.compare(self.step(parts), parts)

    def compare(self, outs: list[list[Tensor]], parts: Sequence[tuple[int, int, int]]) -> None:
        for layer, found in enumerate(outs):
            for part, out in zip(parts, found, strict=True):
                tolerance = TOLERANCE[self.geometry.dtype]
                torch.testing.assert_close(
                    out.float(), self.expected(layer, *part), atol=tolerance, rtol=tolerance
                )

    def batch(self, parts: Sequence[tuple[int, int, int]]) -> ForwardBatch:
        size = self.geometry.block_size
        positions = [(s, p) for s, a, b in parts for p in range(a, b)]
        reached = [self.tables[s][: -(-stop // size)] for s, _, stop in parts]
        widest = max(len(table) for table in reached)
        return ForwardBatch(
            token_ids=sent([0] * len(positions)),
            positions=sent([p for _, p in positions]),
            slots=sent([self.tables[s][p // size] * size + p % size for s, p in positions]),
            query_lens=tuple(b - a for _, a, b in parts),
            context_lens=tuple(b for _, _, b in parts),
            block_tables=sent([table + [0] * (widest - len(table)) for table in reached]),
            logit_rows=sent([]),
            segments=NO_SEGMENTS,
        )


def sent(values: Sequence[int] | Sequence[list[int]]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=DEVICE)


MakeBackend = Callable[[ModelConfig], AttentionBackend]


def make_world(make_backend: MakeBackend, geometry: Geometry, lengths: Sequence[int]) -> World:
    return World(make_backend(geometry.config()), geometry, lengths)


# So many that torch's adapter leaves its way for short sequences early; to a kernel one head is as any other, and each
# costs the interpreter its time.
MANY_HEADS, MANY_KV_HEADS = (4, 2) if INTERPRETED else (16, 8)
GEOMETRIES = {
    "gqa": Geometry(),
    "mha": Geometry(heads=3, kv_heads=3),
    "mqa": Geometry(heads=5, kv_heads=1),
    "d64": Geometry(heads=8, kv_heads=2, head_dim=64),
    "d128": Geometry(heads=4, kv_heads=2, head_dim=128),
    "block 1": Geometry(block_size=1),
    "block 5": Geometry(block_size=5),
    "block 64": Geometry(block_size=64),
    "window": Geometry(windows=(None, 7, 33)),
    "window of one": Geometry(windows=(1,), block_size=4),
    "bf16": Geometry(dtype=torch.bfloat16, head_dim=64, windows=(None, 20)),
    "wide bf16": Geometry(MANY_HEADS, MANY_KV_HEADS, head_dim=64, dtype=torch.bfloat16),
    "wide": Geometry(MANY_HEADS, MANY_KV_HEADS, head_dim=64, windows=(None, 70)),
}
geometries = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=list(GEOMETRIES))


@geometries
def test_whole_prompts(make_backend: MakeBackend, geometry: Geometry) -> None:
    lengths = (1, 2, 16, 17, 50)
    make_world(make_backend, geometry, lengths).check([(s, 0, n) for s, n in enumerate(lengths)])


@geometries
def test_decode_of_many_lengths(make_backend: MakeBackend, geometry: Geometry) -> None:
    lengths = (2, 3, 16, 17, 31, 64, 65, 90, 130)
    world = make_world(make_backend, geometry, lengths)
    world.step([(s, 0, n - 1) for s, n in enumerate(lengths)])
    world.check([(s, n - 1, n) for s, n in enumerate(lengths)])


@geometries
def test_chunks_continue_where_the_last_ended(make_backend: MakeBackend, geometry: Geometry) -> None:
    world = make_world(make_backend, geometry, (70, 23))
    for start, stop in ((0, 10), (10, 11), (11, 40), (40, 70)):
        parts = [(0, start, stop)] + ([(1, start, min(stop, 23))] if start < 23 else [])
        world.check(parts)


@geometries
def test_prompt_chunk_and_decode_in_one_batch(make_backend: MakeBackend, geometry: Geometry) -> None:
    world = make_world(make_backend, geometry, (40, 90, 21, 5, 80))
    world.step([(0, 0, 15), (1, 0, 89), (2, 0, 20), (4, 0, 79)])
    world.check([(2, 20, 21), (0, 15, 40), (1, 89, 90), (3, 0, 5), (4, 79, 80)])


def test_strided_rows_are_read_as_they_lie(make_backend: MakeBackend) -> None:
    """q, k and v arrive as views into one fused projection."""
    geometry = Geometry()
    world = make_world(make_backend, geometry, (9, 30))
    parts = [(0, 0, 9), (1, 0, 30)]
    q, k, v = (torch.cat([x[s][0, a:b] for s, a, b in parts]) for x in (world.q, world.k, world.v))
    fused = torch.cat((q, k, v), dim=1)
    q, k, v = fused.split((4, 2, 2), dim=1)
    batch = world.batch(parts)
    world.cache.write(0, batch.slots, k, v)
    out = world.backend.plan(batch, world.cache).attend(0, q, k, v)
    expected = torch.cat([world.expected(0, *part) for part in parts])
    torch.testing.assert_close(out.unflatten(1, (4, 32)), expected, atol=1e-5, rtol=1e-5)


def test_keys_and_values_land_in_their_slots(make_backend: MakeBackend) -> None:
    world = make_world(make_backend, Geometry(windows=(None, None)), (20,))
    world.step([(0, 0, 20)])
    for layer in range(2):
        keys, values = world.cache.layer(layer)
        table = sent(world.tables[0])
        assert torch.equal(keys[table].flatten(0, 1)[:20], world.k[0][layer])
        assert torch.equal(values[table].flatten(0, 1)[:20], world.v[0][layer])


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_others_left_in_the_cache_is_never_read(make_backend: MakeBackend, poison: float) -> None:
    """A sequence must not suffer from another's broken numbers, nor from those of a block's last owner."""
    lengths = (5, 18, 100)
    world = make_world(make_backend, Geometry(windows=(None, 6)), lengths)
    for layer in range(2):
        for cached in world.cache.layer(layer):
            cached[: world.cache.num_blocks].fill_(poison)
    world.step([(s, 0, n - 2) for s, n in enumerate(lengths)])
    world.check([(s, n - 2, n - 1) for s, n in enumerate(lengths)])
    world.check([(s, n - 1, n) for s, n in enumerate(lengths)])


@pytest.mark.parametrize("wide", [False, True], ids=["small heads", "large heads"])
def test_result_does_not_depend_on_the_batch(make_backend: MakeBackend, wide: bool) -> None:
    """Bit for bit in float32: a sequence alone, and among others of all lengths."""
    geometry = GEOMETRIES["wide"] if wide else replace(Geometry(), windows=(None, 40))
    lengths = (3, 20, 33, 64, 65, 100, 200, 21, 64)
    world = make_world(make_backend, geometry, lengths)
    world.step([(s, 0, n - 1) for s, n in enumerate(lengths)])
    parts = [(s, n - 1, n) for s, n in enumerate(lengths)]
    together = world.step(parts)
    for index, part in enumerate(parts):
        alone = world.step([part])
        for layer in range(2):
            assert torch.equal(alone[layer][0], together[layer][index])


@pytest.mark.parametrize("geometry", [Geometry(), GEOMETRIES["bf16"]], ids=["float32", "bf16"])
def test_long_contexts(make_backend: MakeBackend, geometry: Geometry) -> None:
    """Long enough that a backend may split a row's tokens: decode, a short piece after many tokens, and company."""
    world = make_world(make_backend, geometry, (600, 1300, 40, 257))
    world.store([(0, 0, 599), (1, 0, 1280), (2, 0, 39), (3, 0, 256)])
    world.check([(0, 599, 600), (1, 1280, 1300), (2, 39, 40), (3, 256, 257)])


def test_blocks_may_lie_further_apart_than_they_are_long(make_backend: MakeBackend) -> None:
    """Blocks of a layer's keys are cuts of an arena that other things share."""
    geometry = Geometry(windows=(None, 9))
    world = make_world(make_backend, geometry, (30, 50))
    world.cache = Scattered(world.cache)
    world.step([(0, 0, 20), (1, 0, 49)])
    world.check([(0, 20, 30), (1, 49, 50)])
    world.check([(0, 29, 30), (1, 49, 50)])


class Scattered(KVCache):
    """The cache of `source`, with as much room between two blocks of a layer as a block takes, full of NaN."""

    def __init__(self, source: KVCache) -> None:
        super().__init__(source.layout, source.num_blocks, source.device)
        self._keys, self._values = (
            tuple(scattered(layer) for layer in cached) for cached in (self._keys, self._values)
        )

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        for cached, rows in zip(self.layer(layer), (k, v), strict=True):
            cached[slots // self.block_size, slots % self.block_size] = rows


def scattered(cached: Tensor) -> Tensor:
    room = torch.full(
        (len(cached), 2, *cached.shape[1:]), torch.nan, dtype=cached.dtype, device=cached.device
    )
    room[:, 0] = cached
    return room[:, 0]


@pytest.mark.parametrize(
    "geometry", [Geometry(windows=(None, 20)), GEOMETRIES["bf16"]], ids=["float32", "bf16"]
)
def test_a_reserved_step_is_filled_again_and_again(
    make_graph_backend: Callable[[ModelConfig], GraphAttention], geometry: Geometry
) -> None:
    """Fewer sequences than rows, then as many, then longer ones; the buffers stay where they are."""
    lengths = (5, 330, 40, 70)
    backend = make_graph_backend(geometry.config())
    world = World(backend, geometry, lengths)
    world.store([(s, 0, n - 2) for s, n in enumerate(lengths)])
    reserved = backend.reserve(4, 64, world.cache)
    for parts in (
        [(0, 3, 4), (3, 68, 69)],
        [(s, n - 2, n - 1) for s, n in enumerate(lengths)],
        [(1, 329, 330), (2, 39, 40)],
    ):
        reserved.refill(world.batch(parts))
        world.compare(world.attend(Padded(reserved, 4), parts), parts)


@dataclass(frozen=True)
class Padded:
    """A reserved step is attended with all its rows, as a graph of fixed size does."""

    step: AttentionStep
    rows: int

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        padded = (torch.cat([x, x.new_ones(self.rows - len(x), *x.shape[1:])]) for x in (q, k, v))
        return self.step.attend(layer, *padded)[: len(q)]


def test_reserved_and_planned_steps_agree(
    make_graph_backend: Callable[[ModelConfig], GraphAttention],
) -> None:
    """Bit for bit, so that whether a graph runs never shows in the tokens."""
    lengths = (300, 17)
    backend = make_graph_backend(Geometry().config())
    world = World(backend, Geometry(), lengths)
    world.store([(s, 0, n - 1) for s, n in enumerate(lengths)])
    parts = [(s, n - 1, n) for s, n in enumerate(lengths)]
    planned = world.step(parts)
    reserved = backend.reserve(2, 32, world.cache)
    reserved.refill(world.batch(parts))
    found = world.attend(reserved, parts)
    assert all(torch.equal(a, b) for a, b in zip(planned[0], found[0], strict=True))


@settings(
    deadline=None,
    max_examples=examples(6 if INTERPRETED else 16),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_schedule_of_any_sequences(make_backend: MakeBackend, data: st.DataObject) -> None:
    """Sequences advance by arbitrary pieces, in batches of arbitrary mix and order, until all are done."""
    kv_heads, group = data.draw(st.sampled_from([(1, 1), (1, 3), (2, 2), (4, 1), (8, 4)]))
    geometry = Geometry(
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=data.draw(st.sampled_from([16, 64])),
        block_size=data.draw(st.sampled_from([1, 3, 16])),
        windows=(data.draw(st.sampled_from([None, 1, 5, 30])),),
    )
    lengths = data.draw(st.lists(st.integers(1, 90), min_size=1, max_size=6))
    world = make_world(make_backend, geometry, lengths)
    done = [0] * len(lengths)
    while unfinished := [s for s, length in enumerate(lengths) if done[s] < length]:
        chosen = data.draw(st.lists(st.sampled_from(unfinished), min_size=1, unique=True))
        parts = []
        for sequence in chosen:
            left = lengths[sequence] - done[sequence]
            count = data.draw(st.sampled_from([1, max(1, left // 2), left]))
            parts.append((sequence, done[sequence], done[sequence] + count))
            done[sequence] += count
        world.check(parts)
