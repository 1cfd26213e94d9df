"""Every implementation of LayerOps computes what a layer's definition says between its matrices, for rows with and
without adapters, and keeps keys and values where they belong."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from lora.ops.grouped import GroupedLora
from lora.ops.triton.op import TritonLora
from lora.segments import AdapterWeights
from lora.target_modules import LAYER_GROUPS, SiteGroup
from model.batch import ForwardBatch
from model.config import ModelConfig, RopeConfig
from model.kv_cache import KVCache, KVLayout
from model.linear.base import Linear
from model.ops.base import LayerOps, LayerStep
from model.ops.eager import EagerOps
from model.ops.native.library import load_row_functions
from model.ops.native.native_rows import DTYPES as NATIVE_DTYPES
from model.ops.native.native_rows import NativeRows
from model.ops.triton.layer import TritonOps
from model.rope import inverse_frequencies
from tests.conformance.test_lora_op import Batch, adapter, expected
from tests.conformance.test_lora_op import batch as lora_batch
from tests.kernels.interpreter import DEVICE, RUNS_TRITON

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
MARK = 7.0  # in the cache, where nothing was stored
BLOCK_SIZE = 4
ROPES = {
    "default": RopeConfig("default", 10000.0, 1.0, 64),
    "linear": RopeConfig("linear", 10000.0, 4.0, 64),
    "llama3": RopeConfig("llama3", 500000.0, 8.0, 64),
    "dynamic": RopeConfig("dynamic", 10000.0, 2.0, 64),
}
# Rows per sequence, and the adapter of each, None for the base.
BATCHES: dict[str, list[tuple[int, int | None]]] = {
    "base": [(1, None), (1, None), (19, None)],
    "decode": [(1, 0), (1, 1), (1, None), (1, 2)],
    "mixed": [(1, None), (1, 0), (17, 1), (3, None), (1, 2), (9, None)],
    "prefill": [(70, 0), (1, 1), (130, None), (65, 2)],
}
# The longest batch once in a narrow dtype, the most mixed one in all.
CASES = [(spec, torch.float32) for spec in BATCHES if spec != "prefill"] + [
    ("mixed", torch.float16),
    ("mixed", torch.bfloat16),
    ("prefill", torch.bfloat16),
]


@dataclass(frozen=True, slots=True)
class Backend:
    """An implementation, made from a model and the adapters' dtype, and where its tensors are."""

    make: Callable[[ModelConfig, torch.dtype, torch.dtype], LayerOps]
    device: torch.device = CPU
    dtypes: Sequence[torch.dtype] = tuple(TOLERANCE)


BACKENDS = {"eager": Backend(lambda config, dtype, _: EagerOps(config, dtype, CPU, GroupedLora()))}
if (functions := load_row_functions()) is not None:
    rows = NativeRows(functions)
    BACKENDS["native"] = Backend(
        lambda config, dtype, _: EagerOps(config, dtype, CPU, GroupedLora(), rows), dtypes=NATIVE_DTYPES
    )
if RUNS_TRITON:
    BACKENDS["triton"] = Backend(
        lambda config, dtype, wide: TritonOps(config, dtype, TritonLora(config.base_shape(), wide, DEVICE)),
        DEVICE,
    )

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=200,
    hidden_size=64,
    intermediate_size=144,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rms_norm_eps=1e-5,
    rope=ROPES["default"],
    windows=(None, None),
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    qk_norm=False,
    tied_embeddings=False,
    max_model_len=4096,
    dtype="float32",
    bos_token_id=None,
    eos_token_ids=(),
)


class World:
    """A batch over one implementation: sequences that continue from different lengths, in shuffled blocks."""

    def __init__(
        self,
        backend: Backend,
        spec: str,
        config: ModelConfig = CONFIG,
        dtype: torch.dtype = torch.float32,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        self.spec, self.config, self.device, self.dtype = BATCHES[spec], config, backend.device, dtype
        self.adapters = self._adapters(adapter_dtype or dtype)
        lengths = [rows for rows, _ in self.spec]
        starts = [3 * number for number in range(len(lengths))]
        tokens = [start + rows for start, rows in zip(starts, lengths, strict=True)]
        blocks = [-(-count // BLOCK_SIZE) for count in tokens]
        dealt = torch.randperm(sum(blocks), generator=torch.Generator().manual_seed(1)).split(blocks)
        self.positions = torch.cat([torch.arange(a, b) for a, b in zip(starts, tokens, strict=True)])
        self.slots = torch.cat([
            table[torch.arange(start, stop) // BLOCK_SIZE] * BLOCK_SIZE + torch.arange(start, stop) % BLOCK_SIZE
            for table, start, stop in zip(dealt, starts, tokens, strict=True)
        ])  # fmt: skip
        layout = KVLayout.of(config, dtype, BLOCK_SIZE)
        self.cache = KVCache(layout, sum(blocks) + 1, self.device)
        for layer in range(config.num_layers):
            for kept in self.cache.layer(layer):
                kept.fill_(MARK)
        table = lora_batch(config.base_shape(), SiteGroup.OUT, self.spec, self.adapters).table
        self.batch = ForwardBatch(
            token_ids=torch.zeros_like(self.positions).to(self.device),
            positions=self.positions.to(self.device),
            slots=self.slots.to(self.device),
            query_lens=tuple(lengths),
            context_lens=tuple(tokens),
            block_tables=torch.zeros(len(lengths), 1, dtype=torch.int64),
            logit_rows=torch.arange(1),
            segments=table,
        )
        if dtype not in backend.dtypes:
            pytest.skip(f"it does not take {dtype}")
        self.ops = backend.make(config, dtype, adapter_dtype or dtype)
        self.step: LayerStep = self.ops.plan(self.batch, self.cache)

    def _adapters(self, dtype: torch.dtype) -> list[AdapterWeights]:
        shape = self.config.base_shape()
        few = [("q_proj", "v_proj", "up_proj"), ("k_proj", "gate_proj", "down_proj")]
        return [
            adapter(shape, 8, 0, dtype, device=self.device),
            adapter(shape, 21, 1, dtype, few[0], device=self.device),
            adapter(shape, 5, 2, dtype, few[1], device=self.device),
        ]

    def draw(self, group: SiteGroup) -> tuple[Batch, Tensor]:
        """A random input and projection of it, and the projection with the adapters' share, in float64."""
        given = lora_batch(self.config.base_shape(), group, self.spec, self.adapters, self.dtype)
        given = replace(given, y=given.y * 2)
        return given, expected(given, 1 if group in LAYER_GROUPS else 0, group)

    def assert_close(self, found: Tensor, want: Tensor) -> None:
        tolerance = TOLERANCE[self.dtype]
        assert found.dtype == self.dtype
        torch.testing.assert_close(
            found.double().cpu(), want, rtol=tolerance, atol=tolerance * float(want.abs().max())
        )


def projecting(given: Batch) -> Linear:
    """The base projection that turns the batch's x into its y."""

    def project(x: Tensor) -> Tensor:
        assert x is given.x
        return given.y.clone()

    return project


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    return BACKENDS[request.param]


def rotated(x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    """x: [T, heads, head_dim] float64, each pair (i, i + head_dim / 2) turned by position * inv_freq[i]."""
    angle = (positions[:, None] * inv_freq.double())[:, None]
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()), dim=-1)


def expected_heads(world: World, y: Tensor, qk_norm: Tensor | None, inv_freq: Tensor) -> Sequence[Tensor]:
    """q, k and v by their definition, in float64."""
    config = world.config
    heads = y.unflatten(1, (-1, config.head_dim))
    qk, v = heads.split((config.num_heads + config.num_kv_heads, config.num_kv_heads), dim=1)
    if qk_norm is not None:
        qk = qk / (qk.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * qk_norm.double()
    qk = rotated(qk, world.positions, inv_freq)
    return (*qk.split((config.num_heads, config.num_kv_heads), dim=1), v)


def assert_heads(world: World, qk_norm: Tensor | None = None, inv_freq: Tensor | None = None) -> None:
    """q, k and v are right, and k and v are in the cache, and nothing else is."""
    config = world.config
    frequencies = inverse_frequencies(config.rope, config.head_dim) if inv_freq is None else inv_freq
    given, y = world.draw(SiteGroup.QKV)
    weight = None if qk_norm is None else qk_norm.to(world.device)
    with torch.inference_mode():
        found = world.step.store_heads(1, projecting(given), given.x, weight)
    for which, want in zip(found, expected_heads(world, y, qk_norm, frequencies), strict=True):
        world.assert_close(which, want)
    for kept, stored in zip(world.cache.layer(1), found[1:], strict=True):
        rows = kept.flatten(0, 1).cpu()
        assert torch.equal(rows[world.slots], stored.cpu())
        others = torch.ones(len(rows), dtype=torch.bool).index_fill_(0, world.slots, False)
        assert (rows[others] == MARK).all()
    assert all((kept == MARK).all() for kept in world.cache.layer(0))


@pytest.mark.parametrize(("spec", "dtype"), CASES, ids=str)
def test_heads_of_every_batch(backend: Backend, spec: str, dtype: torch.dtype) -> None:
    assert_heads(World(backend, spec, dtype=dtype))


@pytest.mark.parametrize("rope", ROPES)
def test_heads_under_every_rope(backend: Backend, rope: str) -> None:
    assert_heads(World(backend, "decode", replace(CONFIG, rope=ROPES[rope])))


@pytest.mark.parametrize("head_dim", [16, 12, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_heads_with_a_norm_of_q_and_k(backend: Backend, dtype: torch.dtype, head_dim: int) -> None:
    config = replace(CONFIG, qk_norm=True, head_dim=head_dim)
    rng = torch.Generator().manual_seed(5)
    weight = torch.randn(config.num_heads + config.num_kv_heads, head_dim, generator=rng).to(dtype)
    assert_heads(World(backend, "decode", config, dtype), weight)


def test_heads_of_one_kv_head(backend: Backend) -> None:
    assert_heads(World(backend, "decode", replace(CONFIG, num_kv_heads=1)))


@pytest.mark.parametrize(("spec", "dtype"), CASES, ids=str)
def test_gate_of_every_batch(backend: Backend, spec: str, dtype: torch.dtype) -> None:
    world = World(backend, spec, dtype=dtype)
    given, y = world.draw(SiteGroup.GATE_UP)
    with torch.inference_mode():
        found = world.step.gate(1, projecting(given), given.x)
    gate, up = y.chunk(2, dim=1)
    world.assert_close(found, gate * gate.sigmoid() * up)


@pytest.mark.parametrize("group", [SiteGroup.OUT, SiteGroup.DOWN], ids=lambda group: group.name)
@pytest.mark.parametrize(("spec", "dtype"), CASES, ids=str)
def test_sums_of_every_batch(backend: Backend, spec: str, dtype: torch.dtype, group: SiteGroup) -> None:
    world = World(backend, spec, dtype=dtype)
    given, y = world.draw(group)
    residual = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    here = residual.to(world.device)
    with torch.inference_mode():
        summed = world.step.add(1, group, projecting(given), given.x, here)
        alone = world.step.add(1, group, projecting(given), given.x, None)
    world.assert_close(summed, residual.double() + y)
    world.assert_close(alone, y)
    assert torch.equal(here.cpu(), residual), "the residual is read, not written"


@pytest.mark.parametrize("group", LAYER_GROUPS, ids=lambda group: group.name)
def test_adapters_may_be_wider_than_the_model(backend: Backend, group: SiteGroup) -> None:
    world = World(backend, "mixed", dtype=torch.bfloat16, adapter_dtype=torch.float32)
    given, y = world.draw(group)
    with torch.inference_mode():
        if group is SiteGroup.QKV:
            assert_heads(world)
        elif group is SiteGroup.GATE_UP:
            gate, up = y.chunk(2, dim=1)
            world.assert_close(world.step.gate(1, projecting(given), given.x), gate * gate.sigmoid() * up)
        else:
            world.assert_close(world.step.add(1, group, projecting(given), given.x, None), y)


@pytest.mark.parametrize("every", [True, False], ids=["all rows", "last rows"])
@pytest.mark.parametrize(("spec", "dtype"), CASES, ids=str)
def test_logits_of_every_batch(backend: Backend, spec: str, dtype: torch.dtype, every: bool) -> None:
    world = World(backend, spec, dtype=dtype)
    lengths = [rows for rows, _ in world.spec]
    rows = (
        list(range(sum(lengths))) if every else [sum(lengths[:end]) - 1 for end in range(1, len(lengths) + 1)]
    )
    given, y = world.draw(SiteGroup.HEAD)
    table = world.batch.segments
    batch = replace(
        world.batch, logit_rows=torch.tensor(rows), logit_segments=table if every else table.of_rows(rows)
    )
    chosen = replace(given, x=given.x[rows].contiguous(), y=given.y[rows].contiguous())
    with torch.inference_mode():
        step = world.ops.plan(batch, world.cache)
        residual = torch.zeros(len(y), world.config.hidden_size, dtype=dtype, device=world.device)
        inner, _ = world.draw(SiteGroup.OUT)
        step.add(1, SiteGroup.OUT, projecting(inner), inner.x, residual)  # as in a step: the head comes last
        world.assert_close(step.head(projecting(chosen), chosen.x), y[rows])


@pytest.mark.parametrize("wide", [False, True], ids=["as wide as the model", "wider"])
@pytest.mark.parametrize(("spec", "dtype"), CASES, ids=str)
def test_embeddings_of_every_batch(backend: Backend, spec: str, dtype: torch.dtype, wide: bool) -> None:
    world = World(backend, spec, dtype=dtype, adapter_dtype=torch.float32 if wide else None)
    given, y = world.draw(SiteGroup.EMBEDDING)
    config = world.config
    rng = torch.Generator().manual_seed(3)
    embedding = torch.randn(config.vocab_size, config.hidden_size, generator=rng).to(world.device, dtype)
    with torch.inference_mode():
        found = world.step.embed(embedding, given.x)
    world.assert_close(found, embedding.double().cpu()[given.x.cpu()] + y - given.y.double().cpu())


def test_adapters_without_the_head_leave_logits_alone(backend: Backend) -> None:
    world = World(backend, "decode")
    given, _ = world.draw(SiteGroup.HEAD)
    with torch.inference_mode():
        found = world.step.head(projecting(given), given.x)
    assert torch.equal(found, given.y)


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("width", [64, 100, 1024])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_norm(backend: Backend, dtype: torch.dtype, width: int, rows: int) -> None:
    world = World(backend, "base", dtype=dtype)
    rng = torch.Generator().manual_seed(3)
    x, weight = (torch.randn(shape, generator=rng).to(dtype) for shape in ((rows, width), (width,)))
    with torch.inference_mode():
        found = world.step.norm(x.to(world.device), weight.to(world.device))
    wide = x.double()
    want = wide / (wide.square().mean(-1, keepdim=True) + CONFIG.rms_norm_eps).sqrt() * weight.double()
    assert found.shape == want.shape
    if rows:
        world.assert_close(found, want)
