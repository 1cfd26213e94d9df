"""Let pullers in, lease them what this node publishes, and end every lease exactly once.

Each connection has a thread, which is asleep in the socket most of the time, and at most one lease. That thread keeps
the lease's time: every call it makes is bounded by the lease's deadline, and the lease ends before it moves on.
"""

import logging
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from dataclasses import dataclass, field

from transport.base import Address, Region, RemoteRegion
from transport.control.connection import Connection, Deadline
from transport.control.messages import (
    Grant,
    LeaseReleased,
    LeaseRequest,
    Read,
    ReleaseLease,
    printable,
    refusal_of,
)
from transport.control.security import Authenticator
from transport.errors import (
    LeaseExpired,
    NotOffered,
    PathUnavailable,
    PeerGone,
    PullTimeout,
    TransportError,
    WireError,
)
from transport.memory.leases import Ending
from transport.memory.local_memory import ON_DEMAND_SHARE, LocalMemory
from transport.paths.base import DataPath

GREETING_S = 5.0
IDLE_S = 300.0
RETRY_S = 0.1
MOST_CONNECTIONS = 256

REFUSALS_LOGGED = 10
REFUSALS_WINDOW_S = 60.0

log = logging.getLogger(__name__)


class _RefusalLog:
    """Logs a few failures in a time, and counts the others: strangers may connect as often as they like."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._window_ends_s, self._seen = 0.0, 0

    def log(self, level: int, message: str, *values: object) -> None:
        """Log a message, unless as many as are allowed have been logged in this time."""
        with self._lock:
            now_s, unsaid = time.monotonic(), 0
            if now_s >= self._window_ends_s:
                unsaid = max(0, self._seen - REFUSALS_LOGGED)
                self._window_ends_s, self._seen = now_s + REFUSALS_WINDOW_S, 0
            self._seen += 1
            if self._seen > REFUSALS_LOGGED:
                return
        if unsaid:
            log.log(level, "%d more connections failed in the time before", unsaid)
        log.log(level, message, *values)


@dataclass(frozen=True, slots=True)
class _PullerSession:
    """A puller that was let in, and the metadata of each path that it was told last."""

    connection: Connection
    metadata: dict[str, str] = field(default_factory=dict[str, str])

    def new_metadata(self, path: DataPath) -> str:
        """Return the path's metadata, or nothing if the puller has it."""
        metadata = path.metadata()
        if self.metadata.get(path.name) == metadata:
            return ""
        self.metadata[path.name] = metadata
        return metadata


class TransportServer:
    """Grants leases of one node's memory, on one address, until closed."""

    def __init__(
        self,
        listen: Address,
        authenticator: Authenticator,
        memory: LocalMemory,
        paths: Sequence[DataPath],
        most_hold_s: float,
    ) -> None:
        self._authenticator = authenticator
        self._memory = memory
        self._paths: Mapping[str, DataPath] = {path.name: path for path in paths}
        self._most_hold_s = most_hold_s
        self._refusals = _RefusalLog()
        self._lock = threading.Lock()
        self._serving: dict[threading.Thread, Connection | None] = {}
        self._slots = threading.Semaphore(MOST_CONNECTIONS)
        self._closed = threading.Event()
        self._closing: Future[None] = Future()  # the same, for those who wait for something else as well
        family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
        self._listener = socket.create_server(
            (listen.host, listen.port), family=family, backlog=MOST_CONNECTIONS
        )
        host, port, *_ = self._listener.getsockname()
        self.address = Address(host, port)
        self._accepting = threading.Thread(target=self._accept, name="transport-accept", daemon=True)
        self._accepting.start()

    def close(self) -> None:
        """Hang up on everybody, and wait until every lease has ended."""
        self._closed.set()
        self._closing.set_result(None)
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._slots.release()
        self._accepting.join()
        self._listener.close()
        with self._lock:
            serving = dict(self._serving)
        for thread, connection in serving.items():
            if connection is not None:
                connection.abort()
            thread.join()

    def _accept(self) -> None:
        while True:
            self._slots.acquire()
            if self._closed.is_set():
                return
            try:
                sock, where = self._listener.accept()
            except OSError as error:
                self._slots.release()
                if not self._closed.wait(RETRY_S):  # out of file descriptors, most likely
                    told = "cannot accept on %s: %s; pullers will try again"
                    self._refusals.log(logging.WARNING, told, self.address, error)
                continue
            thread = threading.Thread(
                target=self._serve, args=(sock, f"{where[0]}:{where[1]}"), name="transport-serve", daemon=True
            )
            with self._lock:
                self._serving[thread] = None
            thread.start()

    def _serve(self, sock: socket.socket, where: str) -> None:
        try:
            self._serve_connection(self._authenticator.accept(sock, where, Deadline.after(GREETING_S)))
        except TransportError as error:
            self._refusals.log(logging.INFO, "refused %s", printable(str(error)))
        finally:
            with self._lock:
                del self._serving[threading.current_thread()]
            self._slots.release()

    def _serve_connection(self, connection: Connection) -> None:
        with self._lock:
            self._serving[threading.current_thread()] = connection
        try:
            if self._closed.is_set():
                return
            capabilities = {name: path.capabilities() for name, path in self._paths.items()}
            self._authenticator.welcome(connection, capabilities, Deadline.after(GREETING_S))
            session = _PullerSession(connection)
            while True:
                self._serve_request(session)
        except (PeerGone, PullTimeout) as error:
            log.debug("%s", error)
        except TransportError as error:
            told = printable(str(error))
            self._refusals.log(logging.INFO, "hanging up on %s: %s", connection.peer, told)
            self._refuse(connection, error)
        finally:
            connection.close()

    def _serve_request(self, session: _PullerSession) -> None:
        """Wait for the next request, and answer it."""
        match session.connection.receive(Deadline.after(IDLE_S)):
            case LeaseRequest() as request:
                self._answer(session, request)
            case Read():
                pass  # said before its lease was refused
            case other:
                raise WireError(
                    f"{session.connection.peer} said {type(other).__name__} without a lease: compare the versions"
                )

    def _answer(self, session: _PullerSession, request: LeaseRequest) -> None:
        try:
            path = self._path(request.path)
            ticket, regions = self._open_lease(request)
            if not all(path.supports(region.device) for region in regions):
                self._memory.leases.end(ticket, Ending.RELEASED)
                raise PathUnavailable(
                    f"{request.name!r} cannot be read through {path.name!r}: choose another"
                )
        except (PathUnavailable, NotOffered) as error:
            session.connection.send(refusal_of(error), Deadline.after(GREETING_S))
            return
        if self._hold(session, request, ticket, regions):
            session.connection.send(LeaseReleased(), Deadline.after(GREETING_S))

    def _path(self, name: str) -> DataPath:
        if name not in self._paths:
            raise PathUnavailable(f"{self._memory.node} has no path {name!r}: choose another")
        return self._paths[name]

    def _open_lease(self, request: LeaseRequest) -> tuple[int, Sequence[Region]]:
        """Open a lease of what is published, or of what its owner publishes within the lease's time.

        Raises NotOffered.
        """
        try:
            return self._memory.leases.open(request.name)
        except NotOffered:
            coming = self._memory.on_demand(request.name)
            if coming is None:
                raise
        within_s = ON_DEMAND_SHARE * min(request.hold_s, self._most_hold_s)
        wait((coming, self._closing), within_s, FIRST_COMPLETED)
        return self._memory.leases.open(request.name)

    def _hold(
        self, session: _PullerSession, request: LeaseRequest, ticket: int, regions: Sequence[Region]
    ) -> bool:
        """Hold the lease until it ends, and tell if the puller waits to hear it.

        Raises LeaseExpired, PeerGone, WireError.
        """
        hold_s = min(request.hold_s, self._most_hold_s)
        deadline = Deadline.after(hold_s)
        ending = Ending.GONE
        try:
            remote = tuple(
                RemoteRegion(self._memory.node, one.arena.key, one.address, one.nbytes, one.device, ticket)
                for one in regions
            )
            path = self._paths[request.path]
            grant = Grant(ticket, hold_s, session.new_metadata(path), remote)
            session.connection.send(grant, deadline)
            ending, confirm = _until_done(session.connection, path, regions, deadline)
            return confirm
        except PullTimeout as error:
            ending = Ending.EXPIRED
            raise LeaseExpired(f"{request.name!r} was granted for {hold_s} s: lease it for longer") from error
        finally:
            self._memory.leases.end(ticket, ending)

    def _refuse(self, connection: Connection, error: TransportError) -> None:
        if not connection.garbled:
            with suppress(TransportError):  # it is gone then, and needs no answer
                connection.send(refusal_of(error), Deadline.after(GREETING_S))


def _until_done(
    connection: Connection, path: DataPath, regions: Sequence[Region], deadline: Deadline
) -> tuple[Ending, bool]:
    """Serve the lease until the puller is done: how it ended, and whether to confirm that. Send the bytes if asked.

    Bytes that were sent need no word that they were pinned: had the lease ended before the last, it would not come.
    """
    match connection.receive(deadline):
        case ReleaseLease(read, confirm):
            return (Ending.READ if read else Ending.RELEASED), confirm
        case Read():
            path.send(connection, regions, deadline)
            return Ending.READ, False
        case other:
            raise WireError(
                f"{connection.peer} said {type(other).__name__} during a lease: compare the versions"
            )
