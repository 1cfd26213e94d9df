"""BlockPool under any use: nothing is used twice, nothing leaks, and a digest finds its own content or nothing."""

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from scheduler.blocks import BlockPool, block_digest, chain_seed
from tests.chance import examples
from tests.scheduler.audit import audit_pool

BLOCK_SIZE = 2
chains = st.tuples(st.sampled_from(("", "a1")), st.lists(st.sampled_from(((0, 0), (0, 1))), max_size=5))


def digests_of(adapter: str, blocks: list[tuple[int, int]]) -> list[bytes]:
    """The chained digests of a text that is cut into blocks."""
    digests = [chain_seed(adapter)]
    for block in blocks:
        digests.append(block_digest(digests[-1], block))
    return digests[1:]


class Holders(RuleBasedStateMachine):
    """Holders take a text's cached prefix, compute and publish the rest, and let go in any order, while the pool gives
    blocks up to others and takes them back."""

    @initialize(num_blocks=st.integers(1, 12), more=st.integers(0, 8))
    def start(self, num_blocks: int, more: int) -> None:
        self.pool = BlockPool(num_blocks, BLOCK_SIZE, num_blocks + more)
        self.holders: list[tuple[int, ...]] = []
        self.memory: dict[
            int, tuple[str, tuple[tuple[int, int], ...]]
        ] = {}  # what each block was computed from

    @rule(chain=chains, publish=st.booleans())
    def hold(self, chain: tuple[str, list[tuple[int, int]]], publish: bool) -> None:
        adapter, text = chain
        digests = digests_of(adapter, text)
        shared = self.pool.lookup(digests)
        for number, block in enumerate(shared):
            assert self.memory[block] == (adapter, tuple(text[: number + 1]))
        before = self.pool.stats()
        room = self.pool.has_room(shared, len(text) - len(shared))
        assert self.pool.stats() == before
        held = Counter(block for holder in self.holders for block in holder)
        taken = sum(1 for block in shared if not held[block])
        open_blocks = [block for block in range(self.pool._open_blocks) if not held[block]]
        assert room == (len(text) - len(shared) <= len(open_blocks) - taken)
        if not room:
            return
        self.pool.share(shared)
        fresh = self.pool.allocate(len(text) - len(shared))
        assert not set(fresh) & set(held)
        assert set(fresh) <= set(open_blocks)
        assert not set(fresh) & set(shared)
        for number, block in enumerate(fresh, len(shared)):
            self.memory[block] = (adapter, tuple(text[: number + 1]))
            if publish:
                self.pool.publish(block, digests[number])
        self.holders.append(shared + fresh)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        self.pool.free(self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1))))

    @rule(data=st.data())
    def extend(self, data: st.DataObject) -> None:
        self.pool.extend(data.draw(st.integers(self.pool.held_blocks, self.pool.most_blocks)))
        assert not self.pool.retreating

    @rule(data=st.data())
    def retreat(self, data: st.DataObject) -> None:
        to = data.draw(st.integers(self.pool.num_blocks, self.pool._open_blocks))
        self.pool.retreat(to)
        assert self.pool.retreating == (to < self.pool.held_blocks)

    @precondition(lambda self: self.pool.retreating)
    @rule()
    def cede(self) -> None:
        held = {block for holder in self.holders for block in holder}
        given = set(range(self.pool._open_blocks, self.pool.held_blocks))
        assert self.pool.vacated == (not given & held)
        if self.pool.vacated:
            self.pool.cede()
            assert self.pool.held_blocks == min(given)
            for block in given:  # others write there
                self.memory[block] = ("others", ())

    @rule(chain=chains)
    def look_up(self, chain: tuple[str, list[tuple[int, int]]]) -> None:
        adapter, text = chain
        for number, block in enumerate(self.pool.lookup(digests_of(adapter, text))):
            assert self.memory[block] == (adapter, tuple(text[: number + 1]))

    @invariant()
    def adds_up(self) -> None:
        audit_pool(self.pool, Counter(block for holder in self.holders for block in holder))

    def teardown(self) -> None:
        for holder in self.holders:
            self.pool.free(holder)
        assert self.pool.available == self.pool._open_blocks
        assert self.pool.stats().used == 0


TestHolders = Holders.TestCase
TestHolders.settings = settings(
    deadline=None, derandomize=True, max_examples=examples(120), stateful_step_count=40
)
