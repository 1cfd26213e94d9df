"""ConnectionPool: the puller's trusted connections to sources, kept for the next lease."""

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
    """A connection to the source at `peer`: which node answered, and through which doors it can be read, best first."""

    peer: Address
    channel: Connection
    node: str
    doors: tuple[DataPath, ...]
    cards: dict[str, str] = field(default_factory=dict)  # the last that came for each door


class ConnectionPool:
    """Idle connections by peer; safe to use from any thread, but a link belongs to whoever has taken it."""

    def __init__(self, guard: Authenticator, doors: Sequence[DataPath], setting: str) -> None:
        self._guard = guard
        self._doors = doors
        self._setting = setting
        self._lock = threading.Lock()
        self._idle: dict[Address, list[PooledConnection]] = defaultdict(list)
        self._taken: set[PooledConnection] = set()
        self._closed = False

    def dial(self, peer: Address, deadline: Deadline) -> PooledConnection:
        """A new link to `peer`. HelloRefused, PeerGone, PullTimeout, PathUnavailable."""
        channel, node, offers = self._guard.dial(peer.host, peer.port, deadline.at_most(DIAL_S))
        try:
            link = PooledConnection(peer, channel, node, usable(self._doors, offers, self._setting))
        except PathUnavailable:
            channel.close()
            raise
        self._add(link)
        return link

    def take(self, peer: Address) -> PooledConnection | None:
        """An idle link on which the source has not hung up meanwhile, if there is one; this does not wait."""
        with self._lock:
            idle = self._idle[peer]
            while idle:
                link = idle.pop()
                if link.channel.is_quiet():
                    self._taken.add(link)
                    return link
                link.channel.close()
        return None

    def put(self, link: PooledConnection) -> None:
        """Keep a link whose last exchange ended well."""
        with self._lock:
            self._taken.discard(link)
            if not self._closed:
                self._idle[link.peer].append(link)
                return
        link.channel.close()

    def drop(self, link: PooledConnection) -> None:
        """Hang up in the middle of an exchange; the peer notices at once."""
        with self._lock:
            self._taken.discard(link)
        link.channel.abort()
        link.channel.close()

    def close(self) -> None:
        """Hang up on idle peers, and make whoever uses a link fail."""
        with self._lock:
            self._closed = True
            idle = [link for links in self._idle.values() for link in links]
            self._idle.clear()
            taken = list(self._taken)
        for link in idle:
            link.channel.close()
        for link in taken:
            link.channel.abort()

    def _add(self, link: PooledConnection) -> None:
        with self._lock:
            if not self._closed:
                self._taken.add(link)
                return
        link.channel.close()
        raise TransportClosed("this transport is closed: open another")
