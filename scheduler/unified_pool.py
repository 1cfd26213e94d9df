"""Divide one arena between K/V blocks, which lie from its start, and rank pages, which lie from its end.

Either side may take what the other does not use, as in S-LoRA's unified pool (arXiv 2311.03285), but in pieces of
any size. K/V gives up blank blocks so that adapters find room for one more, and cached ones where a request waits
for its adapter. Adapters that no live request uses are evicted where a sequence waits for blocks. Neither side goes
below its minimum. The boundary moves by whole quanta, each so many blocks and so many pages.

Numbers only: the live engine and the simulated node move it by the same rule.
"""

import math
from dataclasses import dataclass
from typing import Protocol

from scheduler.blocks import BlockPool


@dataclass(frozen=True, slots=True)
class PoolSplit:
    """How an arena may be divided: `quanta` of `blocks` K/V blocks or `pages` rank pages each.

    K/V has at least `least_kv` of them and at first `kv`, adapters at least `least_adapters`.
    """

    quanta: int
    blocks: int
    pages: int
    kv: int
    least_kv: int
    least_adapters: int

    @classmethod
    def of(
        cls, kv_bytes: int, adapter_bytes: int, block_bytes: int, page_bytes: int, needed: int
    ) -> "PoolSplit":
        """Divide the bytes granted to each side, half of which are its minimum; K/V's is at least `needed` blocks.

        Raises ValueError if they are too few.
        """
        quantum = math.lcm(block_bytes, page_bytes)
        kv, adapters = kv_bytes // quantum, adapter_bytes // quantum
        blocks = quantum // block_bytes
        least_kv = max(1, kv // 2, -(-needed // blocks))
        if kv < least_kv or adapters < 1:
            raise ValueError(
                f"K/V of {kv_bytes} and adapters of {adapter_bytes} bytes share memory by quanta of {quantum}: give K/V"
                f" at least {least_kv * quantum} and adapters at least {quantum}, or let them not share"
            )
        return cls(kv + adapters, blocks, quantum // page_bytes, kv, least_kv, max(1, adapters // 2))

    @classmethod
    def bounded(
        cls, memory_bytes: int, adapter_bytes: int, block_bytes: int, page_bytes: int, needed: int
    ) -> "PoolSplit":
        """Divide `memory_bytes`, of which adapters may take `adapter_bytes` at most and a quarter of that at least.

        K/V has twice its minimum at first, which is at least `needed` blocks. Raises ValueError if that leaves
        nothing for adapters.
        """
        quantum = math.lcm(block_bytes, page_bytes)
        quanta, blocks = memory_bytes // quantum, quantum // block_bytes
        least_kv = max(1, (memory_bytes - adapter_bytes) // quantum, -(-needed // blocks))
        most_adapters = quanta - least_kv
        if most_adapters < 1:
            raise ValueError(
                f"memory of {memory_bytes} bytes is shared by quanta of {quantum}, of which K/V needs {least_kv}:"
                f" give at least {(least_kv + 1) * quantum} bytes, or a shorter max_model_len"
            )
        least_adapters = max(1, most_adapters // 4)
        kv = min(2 * least_kv, quanta - least_adapters)
        return cls(quanta, blocks, quantum // page_bytes, kv, least_kv, least_adapters)

    @property
    def most_adapter_pages(self) -> int:
        """Rank pages that adapters may have at most."""
        return (self.quanta - self.least_kv) * self.pages

    @property
    def most_kv(self) -> int:
        """Quanta that K/V may have at most."""
        return self.quanta - self.least_adapters

    def block_pool(self, block_size: int) -> BlockPool:
        """Make the pool of K/V's blocks, of `block_size` tokens, as they are divided at first."""
        pool = BlockPool(self.least_kv * self.blocks, block_size, self.most_kv * self.blocks)
        pool.extend(self.kv * self.blocks)
        return pool

    @property
    def first_pages(self) -> int:
        """Rank pages that adapters have at first."""
        return (self.quanta - self.kv) * self.pages


class AdapterPages(Protocol):
    """The adapters' side of the boundary: who has which rank pages. All methods are called between steps."""

    def lacking_pages(self) -> int:
        """Return how many more pages at the arena's end a live request's adapter waits for."""
        ...

    def lacks_headroom(self) -> bool:
        """Tell whether the largest adapter that is resident would not find its pages once more."""
        ...

    def could_cede(self, pages: int) -> bool:
        """Tell whether `cede` would do something."""
        ...

    def cede(self, pages: int) -> bool:
        """Give up the arena's last `pages` pages if no live request uses what lies there."""
        ...

    def extend(self, pages: int) -> None:
        """Take over the arena's next `pages` pages."""
        ...


class UnifiedPool:
    """Moves the boundary in each step that has a reason, as far as that goes.

    Called by the owner of `blocks`, under its lock.
    """

    def __init__(self, split: PoolSplit, blocks: BlockPool, adapters: AdapterPages) -> None:
        """Divide as `blocks` and `adapters` hold the arena now."""
        self._split, self._blocks, self._adapters = split, blocks, adapters

    @property
    def kv_quanta(self) -> int:
        """Quanta that K/V has."""
        return self._blocks.held_blocks // self._split.blocks

    def must_move(self, short_blocks: int) -> bool:
        """Return whether `move` would move the boundary, live sequences lacking so many blocks.

        No step may then be under way: it could still write to a block that no sequence holds any more.
        """
        lacking = self._adapters.lacking_pages()
        if self._blocks.retreating:
            return not lacking or self._blocks.vacated
        if lacking:
            return self.kv_quanta > self._split.least_kv
        if short_blocks:
            return self.kv_quanta < self._split.most_kv and self._adapters.could_cede(self._split.pages)
        return self._kv_has_spare()

    def move(self, short_blocks: int) -> None:
        """Move the boundary: back for adapters that requests wait for, forward over adapters that none uses."""
        lacking = self._adapters.lacking_pages()
        if not self._blocks.retreating:
            if lacking:
                wanted = min(-(-lacking // self._split.pages), self.kv_quanta - self._split.least_kv)
                self._retreat(wanted)
            elif short_blocks:
                self._advance(-(-short_blocks // self._split.blocks))
                return
            else:
                self._retreat(1)
        elif not lacking:
            self._blocks.extend(self._blocks.held_blocks)  # the adapters found pages elsewhere
            return
        self._give_vacated_blocks()

    def _kv_has_spare(self) -> bool:
        """Return whether K/V holds a quantum that is blank while adapters have no room for one more."""
        start = self._blocks.held_blocks - self._split.blocks
        can = self.kv_quanta > self._split.least_kv and self._blocks.is_blank_from(start)
        return can and self._adapters.lacks_headroom()

    def _retreat(self, quanta: int) -> None:
        self._blocks.retreat(self._blocks.held_blocks - quanta * self._split.blocks)

    def _give_vacated_blocks(self) -> None:
        held = self._blocks.held_blocks
        if self._blocks.vacated:
            self._blocks.cede()
            self._adapters.extend((held - self._blocks.held_blocks) // self._split.blocks * self._split.pages)

    def _advance(self, quanta: int) -> None:
        """Take so many quanta, or as many halved again and again as lie behind the first that is in use."""
        quanta = min(quanta, self._split.most_kv - self.kv_quanta)
        while quanta and not self._adapters.cede(quanta * self._split.pages):
            quanta //= 2
        self._blocks.extend(self._blocks.held_blocks + quanta * self._split.blocks)
