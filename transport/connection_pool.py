"""Keep the puller's trusted connections to sources for the next lease."""

import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from transport.base import Address
from transport.control.connection import Connection, Deadline
from transport.control.security import Authenticator
from transport.errors import PathUnavailable, TransportClosed
from transport.paths.base import DataPath, usable

DIAL_S = 5.0


@dataclass(frozen=True, slots=True, eq=False)
class PooledConnection:
    """A connection to the source at `peer`: which node answered, and by which paths it can be read, best first."""

    peer: Address
    connection: Connection
    node: str
    paths: tuple[DataPath, ...]
    metadata: dict[str, str] = field(default_factory=dict[str, str])  # the last that came for each path


class ConnectionPool:
    """Idle connections by peer. Safe to use from any thread, but a connection belongs to whoever has taken it."""

    def __init__(self, authenticator: Authenticator, paths: Sequence[DataPath], setting: str) -> None:
        self._authenticator = authenticator
        self._paths = paths
        self._setting = setting
        self._lock = threading.Lock()
        self._idle: dict[Address, list[PooledConnection]] = defaultdict(list)
        self._taken: set[PooledConnection] = set()
        self._closed = False

    def dial(self, peer: Address, deadline: Deadline) -> PooledConnection:
        """Connect to `peer` anew. Raises HelloRefused, PeerGone, PullTimeout, PathUnavailable."""
        connection, node, capabilities = self._authenticator.dial(
            peer.host, peer.port, deadline.at_most(DIAL_S)
        )
        try:
            paths = usable(self._paths, capabilities, self._setting)
        except PathUnavailable:
            connection.close()
            raise
        pooled = PooledConnection(peer, connection, node, paths)
        self._add(pooled)
        return pooled

    def take(self, peer: Address) -> PooledConnection | None:
        """Take an idle connection on which the source has not hung up, if there is one; this does not wait."""
        with self._lock:
            idle = self._idle[peer]
            while idle:
                pooled = idle.pop()
                if pooled.connection.is_quiet():
                    self._taken.add(pooled)
                    return pooled
                pooled.connection.close()
        return None

    def put(self, pooled: PooledConnection) -> None:
        """Keep a connection whose last exchange ended well."""
        with self._lock:
            self._taken.discard(pooled)
            if not self._closed:
                self._idle[pooled.peer].append(pooled)
                return
        pooled.connection.close()

    def drop(self, pooled: PooledConnection) -> None:
        """Hang up in the middle of an exchange; the peer notices at once."""
        with self._lock:
            self._taken.discard(pooled)
        pooled.connection.abort()
        pooled.connection.close()

    def close(self) -> None:
        """Hang up on idle peers, and make whoever uses a connection fail."""
        with self._lock:
            self._closed = True
            idle = [pooled for each in self._idle.values() for pooled in each]
            self._idle.clear()
            taken = list(self._taken)
        for pooled in idle:
            pooled.connection.close()
        for pooled in taken:
            pooled.connection.abort()

    def _add(self, pooled: PooledConnection) -> None:
        with self._lock:
            if not self._closed:
                self._taken.add(pooled)
                return
        pooled.connection.close()
        raise TransportClosed("this transport is closed: open another")
