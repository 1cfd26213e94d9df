"""What must hold of the scheduler's insides after every operation, whatever it was."""

from collections import Counter

from scheduler.blocks import BlockPool
from scheduler.limits import StepLimits
from scheduler.plan import StepPlan
from scheduler.step import StepScheduler


def audit_pool(pool: BlockPool, held: Counter[int]) -> None:
    """Each block is used, cached or blank, as its holders and its digest say; digests are one to one."""
    blank, cached = list(pool._blank), list(pool._cached)
    assert pool._references == [held[block] for block in range(pool.most_blocks)]
    used = [block for block in range(pool.held_blocks) if held[block]]
    assert len(used) == sum(1 for count in held.values() if count), "a block is held that is not the pool's"
    assert sorted(blank + cached) == [block for block in range(pool._open_blocks) if not held[block]]
    assert pool.num_blocks <= pool._open_blocks <= pool.held_blocks <= pool.most_blocks
    assert all(pool._digests[block] is None for block in blank)
    assert all(pool._digests[block] is not None for block in cached)
    published = {digest: block for block, digest in enumerate(pool._digests) if digest is not None}
    assert published == pool._published
    stats = pool.stats()
    assert (stats.used, stats.cached, stats.free) == (len(used), len(cached), len(blank))


def audit_scheduler(scheduler: StepScheduler, pool: BlockPool, limits: StepLimits) -> None:
    """Every live sequence waits with nothing or runs with blocks that cover what it computed."""
    running, waiting = scheduler._running, list(scheduler._waiting)
    bands = [sequence.order[:2] for sequence in waiting]
    assert bands == sorted(bands)
    for tenant in {sequence.request.tenant for sequence in waiting}:
        orders = [sequence.order for sequence in waiting if sequence.request.tenant == tenant]
        assert orders == sorted(orders)
    live = list(scheduler._sequences.values())
    assert sorted(map(id, running + waiting)) == sorted(map(id, live))
    assert sorted(map(id, live)) == sorted(id(s) for group in scheduler._siblings.values() for s in group)
    assert all(scheduler._siblings.values())
    assert len(running) <= limits.most_running
    audit_pool(pool, Counter(block for sequence in running for block in sequence.blocks))
    for sequence in running:
        assert sequence.running
        assert not sequence.waits_for_sibling
        assert 0 <= sequence.computed_tokens < sequence.total_tokens <= limits.max_model_len
        assert sequence.computed_tokens <= sequence.planned_tokens <= sequence.expected_tokens
        assert sequence.planned_tokens <= len(sequence.blocks) * pool.block_size
        assert sequence.drawing == sum(part.samples for part in sequence.in_flight)
        assert sequence.published_blocks == sequence.computed_tokens // pool.block_size
        for block, digest in zip(sequence.blocks, sequence.digests(sequence.published_blocks), strict=False):
            assert pool._digests[block] in (None, digest)
    for sequence in waiting:
        assert not sequence.running
        assert not sequence.in_flight
        assert not sequence.drawing
        assert (sequence.blocks, sequence.computed_tokens, sequence.published_blocks) == ((), 0, 0)


def audit_plan(plan: StepPlan, pool: BlockPool, limits: StepLimits) -> None:
    """The step keeps its budgets, runs a sequence once, and writes to no block that another may read."""
    assert plan.num_tokens <= limits.max_num_batched_tokens
    assert len(plan.slices) <= limits.most_running
    assert len({part.key for part in plan.slices}) == len(plan.slices)
    for part in plan.slices:
        assert part.token_ids
        for block in part.block_table[part.start // pool.block_size :]:
            assert pool._references[block] == 1
            assert pool._digests[block] is None
