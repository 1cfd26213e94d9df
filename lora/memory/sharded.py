"""ShardedWriter: an adapter in parts, one on each device of a group, all at the same offset of equal arenas.

All parts have one layout, so the first device's pages are the others' too: who stays and where it lies is decided
once, and the others do as they are told. A content that goes is not announced; another takes its place.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora.format.packed import PackedLayout
from lora.format.sharding import ShardSpec, shard_layout, shard_rows
from lora.memory.page_writer import DeviceCopier
from lora.segments import AdapterWeights


@dataclass(frozen=True, slots=True)
class ShardDelivery:
    """A share for device `rank`: `rows` ([layout.nbytes] uint8, on the host) belong `offset` bytes into its arena."""

    rank: int
    digest: str
    layout: PackedLayout
    offset: int
    rows: Tensor


class ShardedWriter:
    """Stowage for a group: the first of `cuts` is this `device`'s; `deliver` takes another its share, and waits."""

    def __init__(
        self, cuts: Sequence[ShardSpec], deliver: Callable[[ShardDelivery], None], device: torch.device
    ) -> None:
        self._cuts = tuple(cuts)
        self._deliver = deliver
        self._inlet = DeviceCopier(device)

    def nbytes(self, layout: PackedLayout) -> int:
        """See Stowage: what each device's share takes."""
        return shard_layout(layout, self._cuts[0]).nbytes

    def landing(self, place: Tensor, layout: PackedLayout) -> Tensor:
        """See Stowage: host memory, from which the shares are cut."""
        return torch.empty(layout.nbytes, dtype=torch.uint8)

    def stow(self, place: Tensor, landed: Tensor, layout: PackedLayout, digest: str) -> AdapterWeights:
        """See Stowage. Raises what `deliver` raises."""
        narrow = shard_layout(layout, self._cuts[0])
        for rank, cut in enumerate(self._cuts[1:], start=1):
            rows = self._share(landed, layout, cut, narrow.nbytes)
            self._deliver(ShardDelivery(rank, digest, narrow, int(place.storage_offset()), rows))
        ours = self._share(landed, layout, self._cuts[0], narrow.nbytes)
        return self._inlet.bring(place, ours, narrow, digest)

    def _share(self, landed: Tensor, layout: PackedLayout, cut: ShardSpec, nbytes: int) -> Tensor:
        rows = self._inlet.buffer(nbytes).zero_()
        shard_rows(landed, layout, cut, rows)
        return rows


@dataclass(frozen=True, slots=True)
class _Kept:
    start: int
    stop: int
    weights: AdapterWeights


class ShardArena:
    """The shares of a device other than the first. One thread keeps, another reads."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._arena = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._inlet = DeviceCopier(device)
        self._lock = threading.Lock()
        self._kept: dict[str, _Kept] = {}

    def buffer(self, nbytes: int) -> Tensor:
        """[nbytes] uint8 of host memory, from which `keep` copies quickly."""
        return self._inlet.buffer(nbytes)

    def keep(self, digest: str, layout: PackedLayout, offset: int, rows: Tensor) -> None:
        """Copy a share to its place; what lay there is forgotten. Raises ValueError if it is not within the arena."""
        stop = offset + layout.nbytes
        if offset < 0 or stop > len(self._arena) or len(rows) != layout.nbytes:
            raise ValueError(
                f"a share of {len(rows)} bytes at {offset} is not within {len(self._arena)} bytes"
            )
        with self._lock:
            self._kept = {d: k for d, k in self._kept.items() if k.stop <= offset or k.start >= stop}
        weights = self._inlet.bring(self._arena[offset:stop], rows, layout, digest)
        kept = _Kept(offset, stop, weights)
        with self._lock:
            self._kept[digest] = kept

    def weights(self, digest: str) -> AdapterWeights:
        """The share of this content. Raises KeyError if it is not kept."""
        with self._lock:
            return self._kept[digest].weights
