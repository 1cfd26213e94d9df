"""Speak the puller's half of a lease over one connection: ask, hear the grant, read the bytes, release.

Every call but `ask` blocks, until a deadline at most, and runs in a worker thread. Which connection is taken, and
what becomes of it afterwards, is the client's business.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transport.base import Lease, Region
from transport.connection_pool import PooledConnection
from transport.control.connection import Deadline
from transport.control.messages import Grant, LeaseReleased, LeaseRequest, Message, ReleaseLease
from transport.errors import LeaseExpired, PathUnavailable, PullTimeout, RegionRefused, WireError
from transport.memory.destinations import Destination
from transport.paths.base import DataPath

LAST_EXCHANGE_S = 5.0  # for what ends a lease, whatever its deadline was


@dataclass(frozen=True, slots=True)
class PendingLease:
    """A lease that was asked for and not yet granted, for `hold_s`, which are over at the deadline or later.

    `paths` would do, the first is asked for; with `eager` the bytes as well.
    """

    pooled: PooledConnection
    name: str
    paths: tuple[DataPath, ...]
    hold_s: float
    deadline: Deadline
    eager: bool

    @classmethod
    def ask(
        cls, pooled: PooledConnection, name: str, deadline: Deadline, into: Sequence[Region] | None = None
    ) -> "PendingLease":
        """Ask for a lease, and for the bytes as well if `into` says where they go.

        This does not wait. Only paths that support the devices of `into` are asked for.
        """
        try:
            hold_s = deadline.left_s()
        except TimeoutError as error:
            raise PullTimeout(f"{pooled.peer}: no time is left to ask; allow more") from error
        devices = {region.device for region in into or ()}
        paths = tuple(path for path in pooled.paths if all(map(path.supports, devices)))
        if not paths:
            raise PathUnavailable(
                f"no path to {pooled.peer} supports devices {sorted(devices)}: pull into host memory"
            )
        pending = cls(pooled, name, paths, hold_s, deadline, into is not None)
        pending._send()
        return pending

    def grant(self) -> "OpenLease":
        """Wait for the answer. Where the source cannot use the path, ask for the next one."""
        pooled, path = self.pooled, self.paths[0]
        try:
            grant = pooled.connection.expect(Grant, self.deadline)
        except PathUnavailable:
            if len(self.paths) == 1:
                raise
            other = replace(self, paths=self.paths[1:])
            other._send()
            return other.grant()
        if any(region.node != pooled.node or region.key != grant.ticket for region in grant.regions):
            raise WireError(f"{pooled.peer} grants regions that are not its own: do not use it")
        lease = Lease(pooled.node, self.name, grant.ticket, grant.hold_s, grant.regions)
        if grant.metadata:
            pooled.metadata[path.name] = grant.metadata
        # The source counts from when it heard the request, so this is over before its lease is.
        deadline = self.deadline.sooner(max(0.0, self.hold_s - grant.hold_s))
        return OpenLease(pooled, lease, path, pooled.metadata.get(path.name, ""), deadline)

    def fetch(self, destination: Destination) -> tuple[DataPath, Sequence[Message]]:
        """Wait for the answer and read: the path, and what is left to be said. The destination ends, now or later."""
        with destination.ended_on_error():
            granted = self.grant()
            destination.check(granted.lease)
        return granted.path, granted.read(destination, granted.deadline)

    def _send(self) -> None:
        """Send a few bytes on a connection that was idle, which does not wait."""
        path = self.paths[0]
        request = LeaseRequest(self.name, self.hold_s, path.name)
        self.pooled.connection.send_all(
            [request, *(path.start_messages if self.eager else ())], self.deadline
        )


@dataclass(frozen=True, slots=True)
class OpenLease:
    """A lease at a peer that is open until the deadline, the connection that carries it, and how the bytes come."""

    pooled: PooledConnection
    lease: Lease
    path: DataPath
    metadata: str
    deadline: Deadline

    def check(self, destination: Destination) -> None:
        """Raise RegionRefused unless the lease's bytes fill the destination, and the path gets there."""
        destination.check(self.lease)
        if not all(self.path.supports(region.device) for region in destination.regions):
            raise RegionRefused(
                f"{self.path.name!r} does not support the destination's device: fetch instead"
            )

    def pull(self, destination: Destination, deadline: Deadline) -> Sequence[Message]:
        """Read what was leased, and return what is left to be said. The destination ends, now or later."""
        connection = self.pooled.connection
        with destination.ended_on_error():
            if not connection.is_quiet():
                connection.receive(Deadline.after(LAST_EXCHANGE_S))  # raises why the source ended the lease
            if self.deadline.passed():  # whatever the source has said of it so far
                raise LeaseExpired(
                    f"{self.lease.name!r} was granted for {self.lease.hold_s} s: lease it for longer"
                )
            connection.send_all(self.path.start_messages, deadline)
        return self.read(destination, deadline)

    def read(self, destination: Destination, deadline: Deadline) -> Sequence[Message]:
        """Read bytes that the source was told to send, or that need no word, and return what is left to be said."""
        return self.path.read(self.pooled.connection, self.lease, self.metadata, destination, deadline)

    def release(self) -> None:
        """Give the lease back unread, and wait until the source has heard it."""
        deadline = Deadline.after(LAST_EXCHANGE_S)
        self.pooled.connection.send(ReleaseLease(read=False, confirm=True), deadline)
        self.pooled.connection.expect(LeaseReleased, deadline)
