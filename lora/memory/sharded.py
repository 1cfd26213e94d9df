"""Write an adapter in shards, one on each device of a tensor-parallel group, all at the same offset of equal arenas.

All shards have one layout, so the first device's pages stand for the others': who stays and where it lies is decided
once, and the others follow. A content that goes is not announced; another takes its place.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora.format.packed import PackedLayout
from lora.format.sharding import ShardSpec, shard_layout, shard_rows
from lora.memory.page_writer import PinnedWriter
from lora.segments import AdapterWeights


@dataclass(frozen=True, slots=True)
class ShardDelivery:
    """A shard for device `rank`: `rows` ([layout.nbytes] uint8, on the host) belong `offset` bytes into its arena."""

    rank: int
    digest: str
    layout: PackedLayout
    offset: int
    rows: Tensor


class ShardedWriter:
    """PageWriter for a group: the first of `specs` is this `device`'s; `deliver` takes another its shard, and waits."""

    def __init__(
        self, specs: Sequence[ShardSpec], deliver: Callable[[ShardDelivery], None], device: torch.device
    ) -> None:
        self._specs = tuple(specs)
        self._deliver = deliver
        self._writer = PinnedWriter(device)

    def nbytes(self, layout: PackedLayout) -> int:
        """Return what each device's shard takes."""
        return shard_layout(layout, self._specs[0]).nbytes

    def staging_buffer(self, pages: Tensor, layout: PackedLayout) -> Tensor:
        """Allocate host memory, from which the shards are cut."""
        return torch.empty(layout.nbytes, dtype=torch.uint8)

    def write(self, pages: Tensor, staged: Tensor, layout: PackedLayout, digest: str) -> AdapterWeights:
        """Deliver the others' shards, then write this device's. Raises what `deliver` raises."""
        narrow = shard_layout(layout, self._specs[0])
        for rank, spec in enumerate(self._specs[1:], start=1):
            rows = self._shard(staged, layout, spec, narrow.nbytes)
            self._deliver(ShardDelivery(rank, digest, narrow, int(pages.storage_offset()), rows))
        ours = self._shard(staged, layout, self._specs[0], narrow.nbytes)
        return self._writer.write(pages, ours, narrow, digest)

    def _shard(self, staged: Tensor, layout: PackedLayout, spec: ShardSpec, nbytes: int) -> Tensor:
        rows = self._writer.pinned_buffer(nbytes).zero_()
        shard_rows(staged, layout, spec, rows)
        return rows


@dataclass(frozen=True, slots=True)
class _Written:
    start: int
    stop: int
    weights: AdapterWeights


class ShardArena:
    """The shards of a device other than the first. One thread writes, another reads.

    `_lock` guards which shards there are, not their bytes: no step reads a shard that is being written.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._arena = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._writer = PinnedWriter(device)
        self._lock = threading.Lock()
        self._written: dict[str, _Written] = {}

    def staging_buffer(self, nbytes: int) -> Tensor:
        """Allocate [nbytes] uint8 of host memory, from which `write` copies quickly."""
        return self._writer.pinned_buffer(nbytes)

    def write(self, digest: str, layout: PackedLayout, offset: int, staged: Tensor) -> None:
        """Copy a shard to its pages; what lay there is forgotten. Raises ValueError if it is not within the arena."""
        stop = offset + layout.nbytes
        if offset < 0 or stop > len(self._arena) or len(staged) != layout.nbytes:
            raise ValueError(
                f"a shard of {len(staged)} bytes at {offset} is not within {len(self._arena)} bytes"
            )
        with self._lock:
            self._written = {d: w for d, w in self._written.items() if w.stop <= offset or w.start >= stop}
        weights = self._writer.write(self._arena[offset:stop], staged, layout, digest)
        with self._lock:
            self._written[digest] = _Written(offset, stop, weights)

    def weights(self, digest: str) -> AdapterWeights:
        """Return the shard of this content. Raises KeyError if it is not here."""
        with self._lock:
            return self._written[digest].weights
