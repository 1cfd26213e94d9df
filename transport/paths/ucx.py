"""Read one-sidedly through UCX, between hosts that share InfiniBand or between processes of one host.

The source's processor takes no part in a read, so the control connection answers for it: the lease must still be
open when the puller reports that it has read. A read that has begun cannot be stopped. One that is given up goes on
into its quarantined destination until UCX says that it has ended.
"""

import base64
import hashlib
import json
import logging
import os
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from transport.base import HOST, Arena, Lease, Region, RemoteRegion
from transport.control.connection import Connection, Deadline
from transport.control.messages import LeaseReleased, Message, ReleaseLease
from transport.errors import PathUnavailable, PeerGone, RegionRefused, WireError
from transport.memory.destinations import Destination
from transport.memory.spans import batches, spans
from transport.paths.nixl_agent import NixlAgent, Side, active_infiniband
from transport.paths.ucx_read import UcxRead

READ_BYTES = 64 << 20  # a read is small enough that giving up costs little
READ_PIECES = 256
TRIES = 3
FIRST_BACKOFF_S = 0.05

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reach:
    """Which machines this node's UCX may connect to: its own (`host` names it), those on InfiniBand, or any by TCP."""

    host: str
    infiniband: bool
    open_network: bool

    @classmethod
    def of_this_machine(cls, open_network: bool) -> "Reach":
        """Describe what is found here."""
        return cls(_host_fingerprint(), bool(active_infiniband()), open_network)

    def includes(self, other: "Reach") -> bool:
        """Tell if both ends have a way in common."""
        return (
            self.host == other.host
            or (self.infiniband and other.infiniband)
            or (self.open_network and other.open_network)
        )


class UcxPath:
    """Host and device memory, wherever UCX reaches. Raises PathUnavailable if it does not start here."""

    name = "ucx"
    start_messages = ()

    def __init__(self, name: str, open_network: bool = False) -> None:
        self._agent = NixlAgent(name, open_network)
        self._reach = Reach.of_this_machine(open_network)
        self._lock = threading.Lock()
        self._metadata = encode_metadata(self._reach.host, self._agent.metadata())
        self._peers: dict[str, str] = {}  # a peer's metadata -> its agent's name
        self._reads: Counter[str] = Counter()
        self._devices = {HOST}

    def capabilities(self) -> str:
        """Return this node's reach."""
        return json.dumps(asdict(self._reach))

    def reaches(self, capabilities: str) -> bool:
        """Tell if UCX gets there; capabilities that cannot be understood lead nowhere."""
        try:
            return self._reach.includes(Reach(**json.loads(capabilities)))
        except (ValueError, TypeError):
            return False

    def metadata(self) -> str:
        """Return this host, and the agent's metadata with a digest against damage: NIXL believes what it is given."""
        return self._metadata

    def register(self, arena: Arena) -> None:
        """Let UCX reach the arena; a device that it does not take is left to another path."""
        with self._lock:
            try:
                self._agent.register(arena.memory)
            except PathUnavailable as error:
                if arena.memory.device == HOST:
                    raise
                log.warning("%s; its bytes go through host memory", error)
                return
            self._devices.add(arena.memory.device)
            self._metadata = encode_metadata(self._reach.host, self._agent.metadata())

    def read(
        self,
        connection: Connection,
        lease: Lease,
        metadata: str,
        destination: Destination,
        deadline: Deadline,
    ) -> Sequence[Message]:
        """Read batch by batch; when this raises, the destination may still be quarantined."""
        watched = UcxRead(destination, connection, deadline)
        try:
            local, remote = one_device(destination.regions), one_device(lease.regions)
            copied = batches(spans(lease.regions), spans(destination.regions), READ_BYTES, READ_PIECES)
            for pieces in copied:
                into = Side(local, [(piece.target, piece.nbytes) for piece in pieces])
                source = Side(remote, [(piece.source, piece.nbytes) for piece in pieces])
                self._read_batch(watched, metadata, into, source)
        finally:
            watched.end()
        watched.check()
        if (
            _host_of(metadata) == self._reach.host
        ):  # a hang-up is seen at once, so the lease was open until now
            return (ReleaseLease(read=True, confirm=False),)
        connection.send(ReleaseLease(read=True, confirm=True), deadline)
        connection.expect(LeaseReleased, deadline)
        return ()

    def supports(self, device: int) -> bool:
        """Tell if UCX took the device's memory."""
        return device in self._devices

    def send(self, connection: Connection, regions: Sequence[Region], deadline: Deadline) -> None:
        """Raise WireError: a puller reads by itself."""
        raise WireError(f"{connection.peer} wants bytes sent that it should read: compare the versions")

    def close(self) -> None:
        """Destroy the agent."""
        self._agent.close()

    def _read_batch(self, watched: UcxRead, metadata: str, local: Side, remote: Side) -> None:
        """Try a few times: UCX may have noticed only now that an earlier connection to the peer is dead."""
        for attempt in range(TRIES):
            peer = self._begin_with(metadata)
            try:
                read = self._agent.begin(peer, local, remote)
            except PeerGone:
                self._end_with(peer)
                raise
            if watched.complete(read, partial(self._end_with, peer)):
                return
            self._remove_peer(metadata)
            watched.wait(FIRST_BACKOFF_S * 2**attempt)
        raise PeerGone(f"{watched.connection.peer}: UCX failed {TRIES} times; use another source")

    def _begin_with(self, metadata: str) -> str:
        """Return the peer with this metadata, with one more read open. Raises WireError if that is damaged."""
        with self._lock:
            if metadata not in self._peers:
                self._peers[metadata] = self._agent.add_peer(decode_metadata(metadata))
            peer = self._peers[metadata]
            self._reads[peer] += 1
        return peer

    def _end_with(self, peer: str) -> None:
        """Count one read fewer that is open at `peer`."""
        with self._lock:
            self._reads[peer] -= 1

    def _remove_peer(self, metadata: str) -> None:
        """Connect to this peer afresh next time; but never while NIXL must still tell how a read of it ends."""
        with self._lock:
            peer = self._peers.get(metadata)
            if peer is not None and not self._reads[peer]:
                self._peers = {known: name for known, name in self._peers.items() if name != peer}
                self._agent.remove_peer(peer)


def encode_metadata(host: str, metadata: bytes) -> str:
    """Write the agent's metadata as text, with its host and its digest."""
    return "\n".join((host, hashlib.sha256(metadata).hexdigest(), base64.b64encode(metadata).decode()))


def decode_metadata(text: str) -> bytes:
    """Return the agent's metadata. Raises WireError if it is damaged."""
    try:
        _, digest, encoded = text.split("\n")
        metadata = base64.b64decode(encoded, validate=True)
    except ValueError as error:
        raise WireError(f"{text[:80]!r} is no UCX metadata: {error}; compare the versions") from error
    if hashlib.sha256(metadata).hexdigest() != digest:
        raise WireError("UCX metadata was damaged on its way: lease again")
    return metadata


def _host_of(metadata: str) -> str:
    return metadata.partition("\n")[0]


def one_device(regions: Sequence[Region] | Sequence[RemoteRegion]) -> int:
    """Return the device that all regions lie on. Raises RegionRefused if there are several."""
    devices = {region.device for region in regions}
    if len(devices) > 1:
        raise RegionRefused(
            f"devices {sorted(devices)} in one pull: pull each device's regions by themselves"
        )
    return devices.pop()


def _host_fingerprint() -> str:
    """Name processes that can read each other's memory and loopback: same boot, same namespaces."""
    namespaces = [str(Path("/proc/self/ns", kind).readlink()) for kind in ("pid", "net", "user")]
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return hashlib.sha256("\n".join([boot, *namespaces, str(os.getuid())]).encode()).hexdigest()
