"""BlockPool: who holds which K/V block, and which blocks hold a prefix that may be shared.

Numbers only: the pool knows block ids, reference counts and digests, never the memory behind them. A block's
digest is chained: it covers the adapter, every token before the block and the block's own. So it does a client's
salt, and the prompt's length where that changes how positions are rotated. Equal digests mean equal K/V. A digest is
256 bits wide because tenants choose their prompts, and a collision would serve one tenant the K/V of another.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

_DIGEST_BYTES = 32


def chain_seed(adapter_digest: str, rotated_by: int = 0, salt: str = "") -> bytes:
    """Return the parent of a sequence's first block under the adapter (the base model's digest is empty).

    `rotated_by` is the prompt's length if its K/V depend on that, as beyond a dynamic rope's length, else 0. What has
    a `salt` shares blocks only with what has the same.
    """
    content = (f"{adapter_digest}/{rotated_by}" if rotated_by else adapter_digest).encode()
    if salt:
        content += b"\0" + salt.encode()  # which no adapter's digest has
    return blake2b(content, digest_size=_DIGEST_BYTES).digest()


def adapted_parent(parent: bytes, adapter_digest: str, adapted_from: int) -> bytes:
    """Return the parent of the first block that an activated LoRA acts in, after the base's of digest `parent`.

    The adapter acts from position `adapted_from` on. Equal blocks of tokens may differ in that, since an invocation
    may begin in one block and end in the next.
    """
    content = f"{adapter_digest}@{adapted_from}".encode()
    return blake2b(parent + content, digest_size=_DIGEST_BYTES).digest()


def block_digest(parent: bytes, token_ids: Iterable[int]) -> bytes:
    """Return the digest of a full block of `token_ids` that follows the block (or seed) of digest `parent`."""
    return blake2b(parent + array("q", token_ids).tobytes(), digest_size=_DIGEST_BYTES).digest()


@dataclass(frozen=True, slots=True)
class BlockStats:
    """Blocks held by sequences (`used`), held by none but reusable by digest (`cached`), and blank (`free`);
    and, of the prompt tokens that were looked up, how many the prefix cache supplied."""

    used: int
    cached: int
    free: int
    hit_tokens: int
    queried_tokens: int


class BlockPool:
    """`num_blocks` K/V blocks of `block_size` tokens, counted by reference.

    A block is used (references > 0), cached (none, but its digest is published) or blank. Allocation takes
    blank blocks first and then the cached one that was freed longest ago. A published block is never written
    again while it is published, so sharing it is safe.

    Where memory is shared with others the pool may hold up to `most_blocks`, ids 0 .. held_blocks - 1 at a time, and
    never fewer than `num_blocks`. To give some up it `retreat`s: the last ids are handed out no more, and when
    nobody holds any of them they can be ceded.
    """

    def __init__(self, num_blocks: int, block_size: int, most_blocks: int | None = None) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"{num_blocks=} and {block_size=} must be at least 1: give K/V more memory")
        self.num_blocks = self.held_blocks = self._open_blocks = num_blocks
        self.most_blocks = most_blocks or num_blocks
        self.block_size = block_size
        self.releases = 0  # how often a block lost its last holder; what had no room has none while it stands
        self._references = [0] * self.most_blocks
        self._digests: list[bytes | None] = [None] * self.most_blocks
        self._published: dict[bytes, int] = {}
        # The last is handed out next. A dictionary, so that those at the pool's end are taken out without a search.
        self._blank = OrderedDict.fromkeys(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._hit_tokens = 0
        self._queried_tokens = 0

    @property
    def capacity_tokens(self) -> int:
        """Return tokens whose K/V the whole pool holds."""
        return self.num_blocks * self.block_size

    @property
    def available(self) -> int:
        """Return blocks that `allocate` can hand out now."""
        return len(self._blank) + len(self._cached)

    def blocks_for(self, tokens: int) -> int:
        """Return blocks that hold `tokens` tokens."""
        return -(-tokens // self.block_size)

    def lookup(self, digests: Iterable[bytes]) -> tuple[int, ...]:
        """Return the blocks of the longest run of published digests from the first on. Changes nothing."""
        found: list[int] = []
        for digest in digests:
            block = self._published.get(digest)
            if block is None:
                break
            found.append(block)
        return tuple(found)

    def has_room(self, shared: Sequence[int], fresh: int) -> bool:
        """Return whether `fresh` blocks could be allocated after `shared` have been taken."""
        references = self._references
        revived = sum(1 for block in shared if not references[block])
        return fresh <= self.available - revived

    def share(self, blocks: Iterable[int]) -> None:
        """Add a reference to each of these published blocks."""
        for block in blocks:
            assert self._digests[block] is not None, f"block {block} is not published"
            if not self._references[block]:
                del self._cached[block]
            self._references[block] += 1

    def allocate(self, count: int) -> tuple[int, ...]:
        """Take `count` unshared blocks of undefined content; at most `available`."""
        assert count <= self.available, f"{count} blocks asked, {self.available} available"
        return tuple(self._take() for _ in range(count))

    def free(self, blocks: Sequence[int]) -> None:
        """Drop one reference to each. The last of `blocks` is evicted first: a prefix outlives its tails."""
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} is freed twice"
            self._references[block] -= 1
            if self._references[block]:
                continue
            self.releases += 1
            if block >= self._open_blocks:
                self._unpublish(block)
            elif self._digests[block] is None:
                self._blank[block] = None
            else:
                self._cached[block] = None

    def publish(self, block: int, digest: bytes) -> None:
        """Make a full, computed block reusable by digest. Where another block already bears the digest that
        one stays the published one, and this block stays private."""
        assert self._references[block] > 0, f"block {block} is published by no holder"
        assert self._digests[block] is None, f"block {block} is published twice"
        if self._published.setdefault(digest, block) == block:
            self._digests[block] = digest

    def record_query(self, queried_tokens: int, hit_tokens: int) -> None:
        """Count a prompt that was looked up, for `stats`."""
        self._queried_tokens += queried_tokens
        self._hit_tokens += hit_tokens

    def stats(self) -> BlockStats:
        """Return the pool's state now and its hits since the start."""
        return BlockStats(
            used=self._open_blocks - self.available + len(self._closed_in_use()),
            cached=len(self._cached),
            free=len(self._blank),
            hit_tokens=self._hit_tokens,
            queried_tokens=self._queried_tokens,
        )

    def extend(self, held_blocks: int) -> None:
        """Hold the ids up to `held_blocks`, at most `most_blocks`, and hand all of them out."""
        assert self.held_blocks <= held_blocks <= self.most_blocks
        for block in range(self._open_blocks, held_blocks):
            if not self._references[block]:
                self._blank[block] = None
                self._blank.move_to_end(block, last=False)
        self.held_blocks = self._open_blocks = held_blocks
        self.releases += 1

    def retreat(self, held_blocks: int) -> None:
        """Hand out no id from `held_blocks` on; those that someone holds go when they are freed."""
        assert self.num_blocks <= held_blocks <= self._open_blocks
        for block in range(held_blocks, self._open_blocks):
            if block in self._cached:
                del self._cached[block]
                self._unpublish(block)
            else:
                self._blank.pop(block, None)
        self._open_blocks = held_blocks

    @property
    def retreating(self) -> bool:
        """Return whether ids are held that are handed out no more."""
        return self._open_blocks < self.held_blocks

    @property
    def vacated(self) -> bool:
        """Return whether nobody holds any of the ids that are handed out no more."""
        return not self._closed_in_use()

    def cede(self) -> None:
        """Let go of the ids that are handed out no more, which nobody holds."""
        assert self.vacated, f"blocks {self._closed_in_use()} are held"
        self.held_blocks = self._open_blocks

    def is_blank_from(self, start: int) -> bool:
        """Return whether the ids from `start` on are held by nobody and cached for nobody."""
        ids = range(start, self.held_blocks)
        return not any(self._references[block] or self._digests[block] for block in ids)

    def _closed_in_use(self) -> list[int]:
        return [block for block in range(self._open_blocks, self.held_blocks) if self._references[block]]

    def _unpublish(self, block: int) -> None:
        digest, self._digests[block] = self._digests[block], None
        if digest is not None:
            del self._published[digest]

    def _take(self) -> int:
        if self._blank:
            block, _ = self._blank.popitem()
        else:
            block, _ = self._cached.popitem(last=False)
            self._unpublish(block)
        self._references[block] = 1
        return block
