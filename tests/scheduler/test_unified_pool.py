"""How one memory is divided between K/V and adapters, and who may take what of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.unified_pool import PoolSplit

KIB = 1 << 10


@given(
    memory=st.integers(1, 4000),
    part=st.floats(0, 1),
    block=st.sampled_from((16, 32, 48)),
    page=st.sampled_from((16, 32, 64)),
    needed=st.integers(1, 40),
)
def test_a_divided_memory_is_never_exceeded_and_keeps_both_minima(
    memory: int, part: float, block: int, page: int, needed: int
) -> None:
    adapters = int(memory * part)
    try:
        split = PoolSplit.bounded(memory * KIB, adapters * KIB, block * KIB, page * KIB, needed)
    except ValueError:
        quantum_kib = 64 * 3
        assert memory - max(needed * block, memory - adapters) < 2 * quantum_kib
        return
    quantum = split.blocks * block * KIB
    assert quantum == split.pages * page * KIB
    assert split.quanta * quantum <= memory * KIB
    assert split.least_kv * split.blocks >= needed
    assert split.least_kv <= split.kv <= split.most_kv
    assert 1 <= split.least_adapters <= split.quanta - split.kv
    assert split.most_adapter_pages * page <= max(adapters, 0) + 2 * quantum // KIB


def test_blocks_and_pages_start_as_divided_and_fill_the_memory() -> None:
    split = PoolSplit.bounded(100, 60, 2, 4, needed=3)
    pool = split.block_pool(block_size=16)
    assert (split.quanta, split.least_kv, split.kv) == (25, 10, 20)
    assert (pool.num_blocks, pool.held_blocks, pool.most_blocks) == (20, 40, 44)
    assert pool.held_blocks * 2 + split.first_pages * 4 == 100
    assert split.most_adapter_pages * 4 == 60


def test_a_memory_that_leaves_adapters_nothing_says_what_it_would_need() -> None:
    with pytest.raises(ValueError, match="give at least 88 bytes, or a shorter max_model_len"):
        PoolSplit.bounded(80, 60, 2, 4, needed=42)
