"""BlockPool's rules, one by one."""

import pytest

from scheduler.blocks import BlockPool, BlockStats, block_digest, chain_seed

SEED = chain_seed("a1")
FIRST, SECOND = block_digest(SEED, (1, 2)), block_digest(block_digest(SEED, (1, 2)), (3, 4))


def pool_with_a_cached_chain(num_blocks: int = 3) -> tuple[BlockPool, tuple[int, ...]]:
    """A pool whose two blocks of FIRST and SECOND are held by none."""
    pool = BlockPool(num_blocks, block_size=2)
    chain = pool.allocate(2)
    pool.publish(chain[0], FIRST)
    pool.publish(chain[1], SECOND)
    pool.free(chain)
    return pool, chain


def test_a_digest_covers_the_adapter_what_came_before_and_the_tokens() -> None:
    digests = {
        block_digest(SEED, (1, 2)),
        block_digest(SEED, (2, 1)),
        block_digest(chain_seed("a2"), (1, 2)),
        block_digest(chain_seed(""), (1, 2)),
        block_digest(chain_seed("a1", salt="s"), (1, 2)),
        block_digest(chain_seed("a1", salt="t"), (1, 2)),
        block_digest(chain_seed("a1", 7, "t"), (1, 2)),
        block_digest(chain_seed("a1", 7), (1, 2)),
        block_digest(block_digest(SEED, (1, 2)), (1, 2)),
    }
    assert len(digests) == 9
    assert {len(digest) for digest in digests} == {32}
    assert block_digest(SEED, (1, 2)) == block_digest(SEED, [1, 2])


def test_the_base_model_and_an_adapter_share_no_block() -> None:
    pool, _ = pool_with_a_cached_chain()
    assert pool.lookup([block_digest(chain_seed(""), (1, 2))]) == ()


def test_lookup_ends_at_the_first_block_that_is_missing() -> None:
    pool, chain = pool_with_a_cached_chain()
    assert pool.lookup([FIRST, SECOND]) == chain
    assert pool.lookup([FIRST, b"unknown", SECOND]) == chain[:1]
    assert pool.lookup([b"unknown", FIRST]) == ()


def test_allocation_spares_cached_blocks_while_there_are_blank_ones() -> None:
    pool, chain = pool_with_a_cached_chain()
    (block,) = pool.allocate(1)
    assert block not in chain
    assert pool.lookup([FIRST, SECOND]) == chain


def test_eviction_takes_the_tail_of_what_was_freed_longest_ago() -> None:
    pool, chain = pool_with_a_cached_chain(num_blocks=2)
    assert pool.allocate(1) == chain[1:]
    assert pool.lookup([FIRST, SECOND]) == chain[:1]
    assert pool.allocate(1) == chain[:1]
    assert pool.lookup([FIRST]) == ()


def test_a_block_used_again_is_evicted_later() -> None:
    pool = BlockPool(2, block_size=2)
    old, new = pool.allocate(2)
    pool.publish(old, FIRST)
    pool.publish(new, block_digest(SEED, (9, 9)))
    pool.free((old,))
    pool.free((new,))
    pool.share((old,))
    pool.free((old,))
    assert pool.allocate(1) == (new,)


def test_a_shared_block_lives_until_its_last_holder_leaves() -> None:
    pool, chain = pool_with_a_cached_chain(num_blocks=2)
    pool.share(chain)
    pool.share(chain[:1])
    pool.free(chain)
    assert pool.available == 1
    pool.free(chain[:1])
    assert pool.available == 2


def test_room_is_counted_after_the_cached_blocks_that_would_be_revived() -> None:
    pool, chain = pool_with_a_cached_chain(num_blocks=3)
    assert pool.has_room((), fresh=3)
    assert pool.has_room(chain, fresh=1)
    assert not pool.has_room(chain, fresh=2)
    pool.share(chain)
    assert pool.has_room(chain, fresh=1)


def test_a_second_block_of_the_same_content_stays_private() -> None:
    pool, chain = pool_with_a_cached_chain()
    (twin,) = pool.allocate(1)
    pool.publish(twin, FIRST)
    assert pool.lookup([FIRST]) == chain[:1]
    pool.free((twin,))
    assert pool.stats() == BlockStats(used=0, cached=2, free=1, hit_tokens=0, queried_tokens=0)


def test_stats_tell_blocks_apart_and_count_hits() -> None:
    pool, chain = pool_with_a_cached_chain(num_blocks=4)
    pool.share(chain[:1])
    pool.record_query(queried_tokens=5, hit_tokens=2)
    pool.record_query(queried_tokens=3, hit_tokens=0)
    assert pool.stats() == BlockStats(used=1, cached=1, free=2, hit_tokens=2, queried_tokens=8)
    assert pool.capacity_tokens == 8
    assert [pool.blocks_for(tokens) for tokens in (0, 1, 2, 3)] == [0, 1, 1, 2]


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 16), (4, 0), (-1, 16)])
def test_a_pool_of_nothing_is_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match=f"num_blocks={num_blocks} and block_size={block_size}"):
        BlockPool(num_blocks, block_size)


def test_misuse_is_caught() -> None:
    pool = BlockPool(1, block_size=2)
    with pytest.raises(AssertionError, match="2 blocks asked, 1 available"):
        pool.allocate(2)
    blocks = pool.allocate(1)
    with pytest.raises(AssertionError, match="not published"):
        pool.share(blocks)
    pool.free(blocks)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(blocks)
