"""What an H100 would be given: the kernels of a step of Llama-3.1-8B, compiled as they are launched there."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from lora.format.packed import Module, packed_layout, view
from lora.ops.triton.op import DISTINCT, PREFILL, SHARED, Tiling, TritonLora
from lora.segments import NO_SEGMENTS, AdapterWeights, Segment, SegmentTable
from lora.target_modules import LAYER_GROUPS, SITES, SiteGroup
from model.batch import ForwardBatch
from model.config import ModelConfig, RopeConfig
from model.kv_cache import KVCache, KVLayout
from model.ops.triton.layer import TritonOps
from tests.kernels.compiled import COMPILES, Launch, pretended_h100

pytestmark = pytest.mark.skipif(not COMPILES, reason="the interpreter is on: nothing compiles")

CPU = torch.device("cpu")
BF16 = torch.bfloat16
LLAMA_8B = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=2,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope=RopeConfig("llama3", 500000.0, 8.0, 8192),
    windows=(None, None),
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    qk_norm=False,
    tied_embeddings=False,
    max_model_len=131072,
    dtype="bfloat16",
    bos_token_id=None,
    eos_token_ids=(),
)


def adapter(rank: int, dtype: torch.dtype = BF16, embeds: bool = False) -> AdapterWeights:
    """An adapter of the second layer, or also of the embedding, of no particular values."""
    modules = [Module(1, site, rank, 1.0) for site in SITES]
    if embeds:
        modules.append(Module(0, "embed_tokens", rank, 1.0))
    layout = packed_layout(LLAMA_8B.base_shape(), dtype, modules)
    return view(torch.zeros(layout.nbytes, dtype=torch.uint8), layout, f"rank {rank}")


@pytest.fixture(scope="module")
def adapters() -> list[AdapterWeights]:
    return [adapter(rank) for rank in (8, 16, 128)]


def table(adapters: Sequence[AdapterWeights], rows: int) -> SegmentTable:
    """`rows` rows of each adapter."""
    return SegmentTable(
        tuple(Segment(number * rows, (number + 1) * rows, each) for number, each in enumerate(adapters))
    )


@dataclass(frozen=True, slots=True)
class Step:
    """A model's tensors of one step, at fixed addresses."""

    ops: TritonOps
    cache: KVCache
    batch: ForwardBatch
    projections: dict[SiteGroup, tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, config: ModelConfig, rows: int, lora_dtype: torch.dtype = BF16) -> "Step":
        shape, index = config.base_shape(), torch.arange(rows)
        batch = ForwardBatch(
            index, index, index, (1,) * rows, (1,) * rows, index[:, None], index, NO_SEGMENTS
        )
        projections = {
            group: (
                torch.empty(rows, shape.group_out(group), dtype=BF16),
                torch.empty(rows, shape.of(group.sites[0]).in_features, dtype=BF16),
            )
            for group in LAYER_GROUPS
        }
        cache = KVCache(KVLayout.of(config, BF16, 16), rows // 16 + 1, CPU)
        return cls(TritonOps(config, BF16, TritonLora(shape, lora_dtype, CPU)), cache, batch, projections)

    def launches(self, segments: SegmentTable) -> list[Launch]:
        """Those of one layer."""
        with pretended_h100() as launches, torch.inference_mode():
            step = self.ops.plan(replace(self.batch, segments=segments), self.cache)
            qkv, out, gate_up, down = (self.projections[group] for group in LAYER_GROUPS)
            step.norm(qkv[1], qkv[1][0])
            step.store_heads(1, lambda x: qkv[0], qkv[1], None)
            step.add(1, SiteGroup.OUT, lambda x: out[0], out[1], qkv[1])
            step.gate(1, lambda x: gate_up[0], gate_up[1])
            step.add(1, SiteGroup.DOWN, lambda x: down[0], down[1], qkv[1])
        return launches


SHAPES = {"distinct": (DISTINCT, 1), "shared": (SHARED, 10), "prefill": (PREFILL, 100)}


@pytest.fixture(scope="module", params=SHAPES)
def compiled(request: pytest.FixtureRequest, adapters: list[AdapterWeights]) -> tuple[Tiling, list[Launch]]:
    """The launches of each shape of step, compiled once."""
    tiling, rows = SHAPES[request.param]
    return tiling, Step.of(LLAMA_8B, 3 * rows).launches(table(adapters, rows))


NAMES = [
    "rms_norm",
    *("shrink", "store_heads_expanded"),
    *("shrink", "add_expanded"),
    *("shrink", "gate_expanded"),
    *("shrink", "add_expanded"),
]


def test_a_layer_is_nine_launches(compiled: tuple[Tiling, list[Launch]]) -> None:
    assert [launch.name for launch in compiled[1]] == NAMES


def test_nothing_spills(compiled: tuple[Tiling, list[Launch]]) -> None:
    assert {launch.name: launch.spilled_bytes for launch in compiled[1]} == dict.fromkeys(NAMES, 0)


@pytest.mark.slow
def test_weights_are_read_16_bytes_at_once(compiled: tuple[Tiling, list[Launch]]) -> None:
    for launch in compiled[1]:
        assert launch.count("LDG.E.128") or launch.count("LDGSTS.E.BYPASS.128"), launch.name


def test_matrix_products_run_on_tensor_cores(compiled: tuple[Tiling, list[Launch]]) -> None:
    tiling, launches = compiled
    for launch in launches[1:]:
        assert (launch.count("HGMMA") > 0) == (tiling is PREFILL), launch.name
        assert (launch.count(" HMMA") > 0) == (tiling is SHARED), launch.name


def test_the_grid_finds_room_at_once(compiled: tuple[Tiling, list[Launch]]) -> None:
    tiling, launches = compiled
    room = {launch.name: launch.blocks_per_multiprocessor for launch in launches[1:]}
    assert min(room.values()) >= tiling.programs, room


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_adapters_of_one_byte_an_element_do_not_spill_either(shape: str) -> None:
    tiling, rows = SHAPES[shape]
    narrow = [adapter(rank, torch.float8_e4m3fn) for rank in (8, 128)]
    launches = Step.of(LLAMA_8B, 2 * rows, torch.float8_e4m3fn).launches(table(narrow, rows))
    assert {launch.name: launch.spilled_bytes for launch in launches} == dict.fromkeys(NAMES, 0)
    for launch in launches[1:]:
        assert bool(launch.count("HGMMA") + launch.count(" HMMA")) == (tiling is not DISTINCT), launch.name


# Arguments that a step allocates and computes on the device: what a graph allocates when it is captured.
ALLOCATED = {"rms_norm": (0,), "gate_expanded": (0,), "store_heads_expanded": (8, 9)}  # outputs; cos and sin


@pytest.fixture
def launches_of_two_memberships(adapters: list[AdapterWeights]) -> list[list[Launch]]:
    step = Step.of(LLAMA_8B, 32)
    small, middle, large = adapters
    first = SegmentTable((Segment(0, 7, small), Segment(7, 8, large), Segment(20, 32, middle)))
    second = SegmentTable((Segment(3, 30, large),))
    keys = {step.ops.load(replace(step.batch, segments=segments)) for segments in (first, second)}
    assert len(keys) == 1, "steps of one key may share a graph"
    return [step.launches(first), step.launches(second)]


def test_membership_changes_no_launch(launches_of_two_memberships: list[list[Launch]]) -> None:
    """So that a graph captured under one replays under another."""
    first, second = launches_of_two_memberships
    for one, other in zip(first, second, strict=True):
        assert (one.name, one.grid, one.cubin) == (other.name, other.grid, other.cubin)
        for number, pair in enumerate(zip(one.arguments, other.arguments, strict=True)):
            assert pair[0] == pair[1] or number in ALLOCATED.get(one.name, ()), (one.name, number)


def test_steps_of_other_shapes_have_other_keys(adapters: list[AdapterWeights]) -> None:
    step = Step.of(LLAMA_8B, 4)
    tables = NO_SEGMENTS, table(adapters, 1), table(adapters[:1], 4), table([adapter(8, embeds=True)], 4)
    assert len({step.ops.load(replace(step.batch, segments=each)) for each in tables}) == 4


@pytest.mark.parametrize("shape", SHAPES)
def test_an_adapted_embedding_is_two_launches(adapters: list[AdapterWeights], shape: str) -> None:
    """And none where no adapter of the step changes it. Neither spills, nor asks for more room than the others."""
    tiling, rows = SHAPES[shape]
    step, embedding = Step.of(LLAMA_8B, 2 * rows), torch.empty(2 * rows, 4096, dtype=BF16)
    for chosen, names in ((adapters[0], []), (adapter(24, embeds=True), ["shrink_tokens", "add_expanded"])):
        batch = replace(step.batch, segments=table([chosen, adapters[1]], rows))
        with pretended_h100() as launches, torch.inference_mode():
            step.ops.plan(batch, step.cache).embed(embedding, batch.token_ids)
        assert [launch.name for launch in launches] == names
        assert all(launch.spilled_bytes == 0 for launch in launches)
        assert all(launch.blocks_per_multiprocessor >= tiling.programs for launch in launches)
