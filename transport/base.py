"""Declare how bytes of one node's memory come into another's, and the values that both sides of that seam know.

A transport knows memory, names and deadlines; it does not know what the bytes mean. The owner of memory registers it
as an `Arena`, publishes named `Region`s of it, and withdraws a name before it uses the pages again. A puller leases
a name, which pins the pages at the source, and pulls the bytes into regions of its own.
"""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Annotated, Protocol

import msgspec

from transport.errors import RegionRefused

HOST = -1
MOST_BYTES = 1 << 62
MOST_INT = (1 << 63) - 1

Count = Annotated[int, msgspec.Meta(ge=0, le=MOST_INT)]
"""A whole number in a message; no bound of msgspec may be larger."""


@dataclass(frozen=True, slots=True)
class Memory:
    """A span of bytes that somebody owns: `nbytes` at `address`, in host memory or on the CUDA device `device`.

    `owner` is kept alive as long as the span is registered.
    """

    address: int
    nbytes: int
    device: int = HOST
    owner: object = field(default=None, compare=False, repr=False)

    @classmethod
    def of_buffer(cls, buffer: bytearray | memoryview) -> "Memory":
        """Describe a writable, contiguous buffer in host memory."""
        nbytes = memoryview(buffer).nbytes
        owner = (ctypes.c_ubyte * nbytes).from_buffer(buffer)
        return cls(ctypes.addressof(owner), nbytes, HOST, owner)

    def view(self) -> memoryview:
        """Return the bytes, writable. Raises RegionRefused for device memory, which the processor cannot address."""
        if self.device != HOST:
            raise RegionRefused(
                f"device {self.device}: only UCX reaches device memory; register host memory instead"
            )
        return memoryview((ctypes.c_ubyte * self.nbytes).from_address(self.address)).cast("B")


@dataclass(frozen=True, slots=True)
class Arena:
    """Memory that a transport may read from and write to; `key` is its number at that node."""

    node: str
    key: int
    memory: Memory
    bytes: memoryview | None = field(compare=False, repr=False)

    def region(self, offset: int, nbytes: int) -> "Region":
        """Return `nbytes` from `offset` on. Raises RegionRefused where that leaves the arena or is empty."""
        if offset < 0 or nbytes < 1 or offset + nbytes > self.memory.nbytes:
            raise RegionRefused(
                f"bytes {offset}..{offset + nbytes} of arena {self.key}: it has {self.memory.nbytes}; ask within it"
            )
        return Region(self, offset, nbytes)


@dataclass(frozen=True, slots=True)
class Region:
    """A span of one of this node's arenas; made by `Arena.region`, which checks it."""

    arena: Arena
    offset: int
    nbytes: int

    @property
    def address(self) -> int:
        """Return where the span begins in this process, or on its device."""
        return self.arena.memory.address + self.offset

    @property
    def device(self) -> int:
        """Return HOST, or the CUDA device."""
        return self.arena.memory.device

    def view(self) -> memoryview:
        """Return the bytes, writable. Raises RegionRefused for device memory."""
        if self.arena.bytes is None:
            return self.arena.memory.view()
        return self.arena.bytes[self.offset : self.offset + self.nbytes]

    def overlaps(self, other: "Region") -> bool:
        """Tell if the two spans share a byte, through whichever arenas they are named."""
        return (
            self.device == other.device
            and self.address < other.address + other.nbytes
            and other.address < self.address + self.nbytes
        )


class RemoteRegion(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A span of another node's memory, as plain numbers: worthless without the lease that `key` names."""

    node: str
    arena: Count
    address: Count
    nbytes: Annotated[int, msgspec.Meta(gt=0, le=MOST_BYTES)]
    device: Annotated[int, msgspec.Meta(ge=HOST, le=MOST_INT)]
    key: Count


@dataclass(frozen=True, slots=True, order=True)
class Address:
    """Where a node's transport listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Lease:
    """A name at another node whose pages stay pinned until `pull` or `release`, or for `hold_s` at most."""

    node: str
    name: str
    ticket: int
    hold_s: float
    regions: tuple[RemoteRegion, ...]

    @property
    def nbytes(self) -> int:
        """Count the bytes of all regions together: what the destination must have."""
        return sum(region.nbytes for region in self.regions)


@dataclass(frozen=True, slots=True)
class TransportUsage:
    """What a transport holds right now; how its leases ended and what each path pulled since it was opened."""

    names: int
    leases: int
    destinations: int
    quarantined: int
    endings: Mapping[str, int]
    pulled_bytes: Mapping[str, int]


PublishOnDemand = Callable[[str], Future[None] | None]
"""Called with a name from any thread, and must not wait; None where nothing will be published.

The peer waits for the future, for most of the time that it gave the lease, and is granted what is published then."""


class NodeMemory(Protocol):
    """What a node publishes of its memory, and where pulls write. Any thread may call; nothing waits."""

    def publish(self, name: str, regions: Sequence[Region]) -> None:
        """Let peers read `regions`, in that order, as `name`. Raises RegionBusy if bytes may still land in one."""
        ...

    def withdraw(self, name: str) -> Future[None]:
        """Let nobody lease `name` any more. When the future is done no lease of it is open: its pages may change."""
        ...

    def publish_on_demand(self, publish: PublishOnDemand) -> None:
        """Ask `publish` for every unpublished name that a peer asks for, before the peer is refused."""
        ...

    def settled(self, region: Region) -> Future[None]:
        """Return a future that is done when no byte of an earlier pull can land in `region` any more."""
        ...

    def usage(self) -> TransportUsage:
        """Count what is held now: for metrics, and for tests that nothing leaks."""
        ...


class Transport(Protocol):
    """Move bytes from node to node. Methods that are not coroutines may be called from any thread and never wait."""

    @property
    def node(self) -> str:
        """Return this node's name, unique per incarnation."""
        ...

    @property
    def address(self) -> Address:
        """Return where peers reach this node."""
        ...

    @property
    def memory(self) -> NodeMemory:
        """Return what is published here and where pulls write; closing the transport leaves it readable."""
        ...

    def register(self, memory: Memory) -> Arena:
        """Let regions of `memory` be published and pulled into, until close."""
        ...

    async def lease(self, peer: Address, name: str, hold_s: float) -> Lease:
        """Pin `name` at `peer` for at most `hold_s` (the source may grant less).

        Raises NotOffered, HelloRefused, PeerGone; PullTimeout when no answer came within `hold_s`.
        """
        ...

    async def pull(self, lease: Lease, into: Sequence[Region], timeout_s: float) -> None:
        """Fill `into`, in order, with the bytes of the lease's regions, in order; the lease ends, however this ends.

        Returns only if the source confirmed that the pages were pinned throughout. After PullTimeout, PeerGone,
        LeaseExpired or a cancellation the content of `into` is undefined. It may be used for something else only
        once `settled` says so. Raises RegionRefused if sizes differ, RegionBusy if a region of `into` is in use.
        """
        ...

    async def fetch(self, peer: Address, name: str, into: Sequence[Region], timeout_s: float) -> None:
        """Lease and pull in one exchange, `timeout_s` for both: for whoever knows the size of `name`."""
        ...

    async def release(self, lease: Lease) -> None:
        """End a lease that shall not be pulled; nothing happens if it has ended already."""
        ...

    async def close(self) -> None:
        """Hang up on everybody, and wait a little for the last bytes to land.

        It ends in bounded time. Where bytes of an abandoned pull may land later, a warning says so, and the memory's
        `owner` is kept alive until they have. Memory without an owner may be freed when `settled` says so.
        """
        ...
