"""The attention kernels as an H100 would run them: what they take of it, and which instructions they use."""

import pytest
import torch

from lora.segments import NO_SEGMENTS
from model.attention.triton.backend import TritonPagedAttention
from model.batch import ForwardBatch
from model.kv_cache import KVCache, KVLayout
from tests.conformance.test_attention import Geometry
from tests.kernels.compiled import COMPILES, Launch, pretended_h100

pytestmark = pytest.mark.skipif(not COMPILES, reason="the interpreter is on: nothing compiles")

LLAMA_8B = Geometry(heads=32, kv_heads=8, head_dim=128, dtype=torch.bfloat16)
META = torch.device("meta")


def launches(
    geometry: Geometry, parts: list[tuple[int, int]], widest: int = 256, shift: int = 0
) -> list[Launch]:
    """What attending (rows, context) parts would launch on an H100; block tables of `widest` columns begin `shift`
    words into their memory."""
    config = geometry.config()
    cache = KVCache(KVLayout.of(config, geometry.dtype, geometry.block_size), 8, torch.device("cpu"))
    total = sum(rows for rows, _ in parts)
    nothing = torch.zeros(0, dtype=torch.int64)
    batch = ForwardBatch(
        token_ids=nothing,
        positions=nothing,
        slots=nothing,
        query_lens=tuple(rows for rows, _ in parts),
        context_lens=tuple(context for _, context in parts),
        block_tables=torch.zeros(shift + len(parts) * widest, dtype=torch.int64)[shift:].view(-1, widest),
        logit_rows=nothing,
        segments=NO_SEGMENTS,
    )
    fused = torch.empty(
        total, geometry.heads + 2 * geometry.kv_heads, geometry.head_dim, dtype=geometry.dtype, device=META
    )
    q, k, v = fused.split((geometry.heads, geometry.kv_heads, geometry.kv_heads), dim=1)
    with pretended_h100() as listed:
        TritonPagedAttention(config).plan(batch, cache).attend(0, q, k, v)
    return listed


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("window", [None, 512], ids=["whole", "window"])
@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(32, 8), (28, 4), (8, 8)], ids=["group 4", "group 7", "group 1"]
)
def test_decode_keeps_memory_busy(head_dim: int, window: int | None, heads: int, kv_heads: int) -> None:
    geometry = Geometry(heads, kv_heads, head_dim, windows=(window,), dtype=torch.bfloat16)
    attend, merge = launches(geometry, [(1, 1024)] * 8)
    assert (attend.name, merge.name) == ("attend_items", "merge_shares")
    assert attend.spilled_bytes == merge.spilled_bytes == 0
    assert attend.count("LDGSTS.E.BYPASS.128") > 0  # 16 bytes at a time, past the registers
    assert attend.count("HMMA") > 0
    in_flight = attend.blocks_per_multiprocessor * attend.shared_bytes
    assert in_flight >= 64 * 1024  # of K and V, well above latency times bandwidth of a multiprocessor


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("window", [None, 512], ids=["whole", "window"])
@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(32, 8), (28, 4), (8, 8)], ids=["group 4", "group 7", "group 1"]
)
def test_prompts_use_the_wide_tensor_cores(
    head_dim: int, window: int | None, heads: int, kv_heads: int
) -> None:
    geometry = Geometry(heads, kv_heads, head_dim, windows=(window,), dtype=torch.bfloat16)
    (attend,) = launches(geometry, [(1024, 1024), (900, 1024)])
    assert attend.spilled_bytes == 0
    assert attend.count("HGMMA") > 0
    assert attend.count("LDGSTS.E.BYPASS.128") > 0


def test_one_kernel_reads_tables_of_any_width_wherever_they_lie() -> None:
    """A kernel that is compiled while requests wait holds them up for seconds."""
    geometry = Geometry(32, 8, 128, dtype=torch.bfloat16)
    seen = [launches(geometry, [(1, 1024)] * 3, widest, shift) for widest in (1, 37, 64) for shift in (0, 1)]
    assert len({listed[0].cubin for listed in seen}) == 1


@pytest.mark.slow
def test_float32_compiles_without_spills() -> None:
    geometry = Geometry(heads=8, kv_heads=2, head_dim=128)
    for launch in launches(geometry, [(1, 600), (80, 600)]):
        assert launch.spilled_bytes == 0


def test_a_reserved_step_launches_one_grid_whatever_the_lengths() -> None:
    """What a captured graph needs: the same kernels, grids and addresses in each step."""
    config = LLAMA_8B.config()
    cache = KVCache(KVLayout.of(config, LLAMA_8B.dtype, 16), 8, torch.device("cpu"))
    reserved = TritonPagedAttention(config).reserve(16, 256, cache)
    q = torch.empty(16, 32, 128, dtype=torch.bfloat16)
    seen = []
    for contexts in ((5,) * 3, (4000,) * 16):
        nothing = torch.zeros(0, dtype=torch.int64)
        tables = torch.zeros(len(contexts), -(-contexts[0] // 16), dtype=torch.int64)
        reserved.refill(
            ForwardBatch(
                nothing, nothing, nothing, (1,) * len(contexts), contexts, tables, nothing, NO_SEGMENTS
            )
        )
        with pretended_h100() as listed:
            reserved.attend(0, q, q[:, :8], q[:, :8])
        # the output is the graph's own allocation: everything else stays where it was
        seen.append([(each.name, each.grid, _without_outputs(each)) for each in listed])
    assert seen[0] == seen[1]
    assert [name for name, _, _ in seen[0]] == ["attend_items", "merge_shares"]


def _without_outputs(launch: Launch) -> tuple[object, ...]:
    out = {"attend_items": 3, "merge_shares": 2}[launch.name]
    return launch.arguments[:out] + launch.arguments[out + 1 :]
