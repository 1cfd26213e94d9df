"""UnifiedPool: one arena in which K/V blocks lie from the start and rank pages from the end, and the line between.

Either side may take what the other does not use (as in S-LoRA's unified pool, arXiv 2311.03285, but in pieces of any
size): K/V gives up blank blocks so that adapters find room for one more, and cached ones where a request waits for its
adapter; adapters that no live request uses make way where a sequence waits for blocks. Neither goes below its floor.
The line moves by whole quanta, each so many blocks and so many pages.
"""

import math
from dataclasses import dataclass

import torch

from lora.store.store import AdapterStore
from scheduler.blocks import BlockPool


@dataclass(frozen=True, slots=True)
class PoolSplit:
    """How an arena may be divided: `quanta` of `blocks` K/V blocks or `pages` rank pages each. K/V has at least
    `least_kv` of them and at first `kv`, adapters at least `least_adapters`."""

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
        """Of the bytes granted to each side, of which half are its floor; K/V's is at least `needed` blocks."""
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

    @property
    def most_kv(self) -> int:
        """Quanta that K/V may have at most."""
        return self.quanta - self.least_adapters


def unified_arena(
    division: PoolSplit, block_bytes: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """[bytes] for the whole of it, with the K/V's two odd blocks at its end; and the part of it that is divided."""
    divided = division.quanta * division.blocks * block_bytes
    whole = torch.empty(divided + 2 * block_bytes, dtype=torch.uint8, device=device)
    return whole, whole[:divided]


class UnifiedPool:
    """Moves the line, a little in each step that finds a reason. Called by the owner of `blocks`, under its lock."""

    def __init__(self, division: PoolSplit, blocks: BlockPool, store: AdapterStore) -> None:
        self._division, self._blocks, self._store = division, blocks, store

    @property
    def kv_quanta(self) -> int:
        """Where the line is."""
        return self._blocks.held_blocks // self._division.blocks

    def is_due(self, short_blocks: int) -> bool:
        """Whether `move` would move the line, live sequences lacking so many blocks. No step may then be under way: it
        could still write to a block that nobody holds any more."""
        lacking = self._store.lacking_pages()
        if self._blocks.retreating:
            return not lacking or self._blocks.vacated
        if lacking:
            return self.kv_quanta > self._division.least_kv
        if short_blocks:
            return self.kv_quanta < self._division.most_kv and self._store.could_cede(self._division.pages)
        return self._spares()

    def move(self, short_blocks: int) -> None:
        """Move the line: back for adapters that requests wait for, forward over adapters that no request uses."""
        lacking = self._store.lacking_pages()
        if not self._blocks.retreating:
            if lacking:
                wanted = min(-(-lacking // self._division.pages), self.kv_quanta - self._division.least_kv)
                self._retreat(wanted)
            elif short_blocks:
                self._advance()
                return
            else:
                self._retreat(1)
        elif not lacking:
            self._blocks.extend(self._blocks.held_blocks)  # what was asked for came by another way
            return
        self._hand_over()

    def _spares(self) -> bool:
        """Whether K/V holds a quantum that is blank while adapters have no room for one more."""
        start = self._blocks.held_blocks - self._division.blocks
        can = self.kv_quanta > self._division.least_kv and self._blocks.is_blank_from(start)
        return can and self._store.lacks_headroom()

    def _retreat(self, quanta: int) -> None:
        self._blocks.retreat(self._blocks.held_blocks - quanta * self._division.blocks)

    def _hand_over(self) -> None:
        held = self._blocks.held_blocks
        if self._blocks.vacated:
            self._blocks.cede()
            self._store.extend(
                (held - self._blocks.held_blocks) // self._division.blocks * self._division.pages
            )

    def _advance(self) -> None:
        if self._store.cede(self._division.pages):
            self._blocks.extend(self._blocks.held_blocks + self._division.blocks)
