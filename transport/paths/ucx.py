"""UcxPath: one-sided reads through UCX, between hosts that share InfiniBand or between processes of one host.

The source's processor takes no part in a read, so the control connection vouches for it: the lease must still be open
when the puller reports that it has read. A read that has begun cannot be stopped; one that is given up goes on into
its quarantined landing until UCX says that it has ended.
"""

import base64
import hashlib
import itertools
import json
import logging
import os
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from transport.base import HOST, Arena, Lease, Region, RemoteRegion
from transport.control.connection import Connection, Deadline
from transport.control.messages import LeaseReleased, Message, ReleaseLease
from transport.errors import PathUnavailable, PeerGone, RegionRefused, WireError
from transport.memory.destinations import Destination
from transport.paths.nixl_agent import NixlAgent, Side, active_infiniband
from transport.paths.ucx_read import Span, UcxRead, pair

READ_BYTES = 64 << 20
READ_PIECES = 256
TRIES = 3
FIRST_BACKOFF_S = 0.05

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reach:
    """Which machines this node's UCX may meet: its own (`host` names it), those on InfiniBand, or any by plain TCP."""

    host: str
    infiniband: bool
    open_network: bool

    @classmethod
    def of_this_machine(cls, open_network: bool) -> "Reach":
        """What is found here."""
        return cls(_host_fingerprint(), bool(active_infiniband()), open_network)

    def meets(self, other: "Reach") -> bool:
        """True if both ends have a way in common."""
        return (
            self.host == other.host
            or (self.infiniband and other.infiniband)
            or (self.open_network and other.open_network)
        )


class UcxPath:
    """Host and device memory, wherever UCX reaches. PathUnavailable if it does not start here."""

    name = "ucx"
    cue = ()

    def __init__(self, name: str, open_network: bool = False) -> None:
        self._agent = NixlAgent(name, open_network)
        self._reach = Reach.of_this_machine(open_network)
        self._lock = threading.Lock()
        self._card = _write_card(self._reach.host, self._agent.metadata())
        self._met: dict[str, str] = {}  # a peer's card -> its name
        self._reads: Counter[str] = Counter()
        self._devices = {HOST}

    def offer(self) -> str:
        """This node's reach."""
        return json.dumps(asdict(self._reach))

    def reaches(self, offer: str) -> bool:
        """See `Door`; an offer that cannot be understood leads nowhere."""
        try:
            return self._reach.meets(Reach(**json.loads(offer)))
        except (ValueError, TypeError):
            return False

    def card(self) -> str:
        """This host, and the agent's metadata with a digest against damage: NIXL believes what it is given."""
        return self._card

    def register(self, arena: Arena) -> None:
        """See `Door`."""
        with self._lock:
            try:
                self._agent.register(arena.memory)
            except PathUnavailable as error:
                if arena.memory.device == HOST:
                    raise
                log.warning("%s; its bytes go through host memory", error)
                return
            self._devices.add(arena.memory.device)
            self._card = _write_card(self._reach.host, self._agent.metadata())

    def read(
        self, channel: Connection, lease: Lease, card: str, landing: Destination, deadline: Deadline
    ) -> Sequence[Message]:
        """See `Door`; when this raises, the landing may still be quarantined."""
        flight = UcxRead(landing, channel, deadline)
        try:
            for local, remote in _batches(landing.regions, lease.regions):
                self._read_batch(flight, card, local, remote)
        finally:
            flight.land()
        flight.check()
        if _host_of(card) == self._reach.host:  # a hang-up is seen at once, so the lease was open until now
            return (ReleaseLease(read=True, confirm=False),)
        channel.send(ReleaseLease(read=True, confirm=True), deadline)
        channel.expect(LeaseReleased, deadline)
        return ()

    def carries(self, device: int) -> bool:
        """See `Door`: a device whose memory UCX took."""
        return device in self._devices

    def send(self, channel: Connection, regions: Sequence[Region], deadline: Deadline) -> None:
        """A puller reads by itself: WireError."""
        raise WireError(f"{channel.peer} wants bytes sent that it should read: compare the versions")

    def close(self) -> None:
        """See `Door`."""
        self._agent.close()

    def _read_batch(self, flight: UcxRead, card: str, local: Side, remote: Side) -> None:
        """Try a few times: UCX may have noticed only now that an earlier connection to the peer is dead."""
        for attempt in range(TRIES):
            peer = self._meet(card)
            try:
                read = self._agent.begin(peer, local, remote)
            except PeerGone:
                self._part(peer)
                raise
            if flight.complete(read, partial(self._part, peer)):
                return
            self._forget(card)
            flight.wait(FIRST_BACKOFF_S * 2**attempt)
        raise PeerGone(f"{flight.channel.peer}: UCX failed {TRIES} times; use another source")

    def _meet(self, card: str) -> str:
        """The peer whose card this is, with one more read open. WireError if the card is damaged."""
        with self._lock:
            if card not in self._met:
                self._met[card] = self._agent.meet(_metadata_of(card))
            peer = self._met[card]
            self._reads[peer] += 1
        return peer

    def _part(self, peer: str) -> None:
        """One read fewer is open at `peer`."""
        with self._lock:
            self._reads[peer] -= 1

    def _forget(self, card: str) -> None:
        """Meet this peer afresh next time; but never while NIXL must still tell how a read of it ends."""
        with self._lock:
            peer = self._met.get(card)
            if peer is not None and not self._reads[peer]:
                self._met = {known: met for known, met in self._met.items() if met != peer}
                self._agent.forget(peer)


def _write_card(host: str, metadata: bytes) -> str:
    return "\n".join((host, hashlib.sha256(metadata).hexdigest(), base64.b64encode(metadata).decode()))


def _host_of(card: str) -> str:
    return card.partition("\n")[0]


def _metadata_of(card: str) -> bytes:
    """WireError if it is damaged."""
    try:
        _, digest, encoded = card.split("\n")
        metadata = base64.b64decode(encoded, validate=True)
    except ValueError as error:
        raise WireError(f"{card[:80]!r} is no UCX card: {error}; compare the versions") from error
    if hashlib.sha256(metadata).hexdigest() != digest:
        raise WireError("a UCX card was damaged on its way: lease again")
    return metadata


def _batches(into: Sequence[Region], source: Sequence[RemoteRegion]) -> Iterator[tuple[Side, Side]]:
    """Reads of a few pieces each, small enough that giving up costs little."""
    local, remote = _device(into), _device(source)
    pieces = pair(_spans(source), _spans(into), READ_BYTES)
    while batch := list(itertools.islice(pieces, READ_PIECES)):
        for some in _split(batch):
            yield (
                Side(local, [(target, nbytes) for _, target, nbytes in some]),
                Side(remote, [(address, nbytes) for address, _, nbytes in some]),
            )


def _split(pieces: Sequence[tuple[int, int, int]]) -> Iterator[Sequence[tuple[int, int, int]]]:
    """Runs of pieces of READ_BYTES at most."""
    start, total = 0, 0
    for index, (_, _, nbytes) in enumerate(pieces):
        if total and total + nbytes > READ_BYTES:
            yield pieces[start:index]
            start, total = index, 0
        total += nbytes
    yield pieces[start:]


def _spans(regions: Sequence[Region] | Sequence[RemoteRegion]) -> list[Span]:
    return [Span(region.address, region.nbytes) for region in regions]


def _device(regions: Sequence[Region] | Sequence[RemoteRegion]) -> int:
    devices = {region.device for region in regions}
    if len(devices) > 1:
        raise RegionRefused(
            f"devices {sorted(devices)} in one pull: pull each device's regions by themselves"
        )
    return devices.pop()


def _host_fingerprint() -> str:
    """Equal for processes that can read each other's memory and loopback: same boot, same namespaces."""
    namespaces = [str(Path("/proc/self/ns", kind).readlink()) for kind in ("pid", "net", "user")]
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return hashlib.sha256("\n".join([boot, *namespaces, str(os.getuid())]).encode()).hexdigest()
