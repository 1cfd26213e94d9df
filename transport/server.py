"""Let pullers in, lease them what this node publishes, and end every lease exactly once.

Each connection has a thread, which is asleep in the socket most of the time, and at most one lease. That thread is
the lease's timekeeper: every call it makes is bounded by the lease's deadline, and the lease ends before it moves on.
"""

import logging
import socket
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from dataclasses import dataclass, field

from transport.base import Address, Region, RemoteRegion
from transport.control.connection import Connection, Deadline
from transport.control.messages import Grant, LeaseReleased, LeaseRequest, Read, ReleaseLease, refusal_of
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
from transport.memory.local_memory import BRING_SHARE, LocalMemory
from transport.paths.base import DataPath

GREETING_S = 5.0
IDLE_S = 300.0
RETRY_S = 0.1
MOST_CONNECTIONS = 256

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Guest:
    """A puller that was let in, and the card of each door that it was told last."""

    channel: Connection
    cards: dict[str, str] = field(default_factory=dict)

    def news(self, door: str, card: str) -> str:
        """The card, or nothing if the puller has it."""
        if self.cards.get(door) == card:
            return ""
        self.cards[door] = card
        return card


class TransportServer:
    """Serves one node's holdings on one address until closed."""

    def __init__(
        self,
        listen: Address,
        guard: Authenticator,
        holdings: LocalMemory,
        doors: Sequence[DataPath],
        most_hold_s: float,
    ) -> None:
        self._guard = guard
        self._holdings = holdings
        self._doors: Mapping[str, DataPath] = {door.name: door for door in doors}
        self._most_hold_s = most_hold_s
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
        for thread, channel in serving.items():
            if channel is not None:
                channel.abort()
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
                    log.warning("cannot accept on %s: %s; pullers will try again", self.address, error)
                continue
            thread = threading.Thread(
                target=self._serve, args=(sock, f"{where[0]}:{where[1]}"), name="transport-serve", daemon=True
            )
            with self._lock:
                self._serving[thread] = None
            thread.start()

    def _serve(self, sock: socket.socket, where: str) -> None:
        try:
            self._converse(self._guard.accept(sock, where, Deadline.after(GREETING_S)))
        except TransportError as error:
            log.info("refused %s", error)
        finally:
            with self._lock:
                del self._serving[threading.current_thread()]
            self._slots.release()

    def _converse(self, channel: Connection) -> None:
        with self._lock:
            self._serving[threading.current_thread()] = channel
        try:
            if self._closed.is_set():
                return
            doors = {name: door.offer() for name, door in self._doors.items()}
            self._guard.welcome(channel, doors, Deadline.after(GREETING_S))
            guest = _Guest(channel)
            while True:
                self._listen(guest)
        except (PeerGone, PullTimeout) as error:
            log.debug("%s", error)
        except TransportError as error:
            log.info("hanging up on %s: %s", channel.peer, error)
            self._refuse(channel, error)
        finally:
            channel.close()

    def _listen(self, guest: _Guest) -> None:
        """Wait for the next request, and answer it."""
        match guest.channel.receive(Deadline.after(IDLE_S)):
            case LeaseRequest() as request:
                self._answer(guest, request)
            case Read():
                pass  # said before its lease was refused
            case other:
                raise WireError(
                    f"{guest.channel.peer} said {type(other).__name__} without a lease: compare the versions"
                )

    def _answer(self, guest: _Guest, request: LeaseRequest) -> None:
        try:
            door = self._door(request.path)
            ticket, regions = self._take(request)
            if not all(door.carries(region.device) for region in regions):
                self._holdings.shelf.end(ticket, Ending.RELEASED)
                raise PathUnavailable(
                    f"{request.name!r} cannot be read through {door.name!r}: choose another"
                )
        except (PathUnavailable, NotOffered) as error:
            guest.channel.send(refusal_of(error), Deadline.after(GREETING_S))
            return
        if self._lend(guest, request, ticket, regions):
            guest.channel.send(LeaseReleased(), Deadline.after(GREETING_S))

    def _door(self, name: str) -> DataPath:
        if name not in self._doors:
            raise PathUnavailable(f"{self._holdings.node} has no door {name!r}: choose another")
        return self._doors[name]

    def _take(self, request: LeaseRequest) -> tuple[int, Sequence[Region]]:
        """Open a lease of what is lent, or of what its owner brings within the lease's time. NotOffered."""
        try:
            return self._holdings.shelf.lend(request.name)
        except NotOffered:
            coming = self._holdings.bring(request.name)
            if coming is None:
                raise
        within_s = BRING_SHARE * min(request.hold_s, self._most_hold_s)
        wait((coming, self._closing), within_s, FIRST_COMPLETED)
        return self._holdings.shelf.lend(request.name)

    def _lend(self, guest: _Guest, request: LeaseRequest, ticket: int, regions: Sequence[Region]) -> bool:
        """Hold the lease until it ends; whether the puller waits to hear it. LeaseExpired, PeerGone, WireError."""
        hold_s = min(request.hold_s, self._most_hold_s)
        deadline = Deadline.after(hold_s)
        ending = Ending.GONE
        try:
            remote = tuple(
                RemoteRegion(self._holdings.node, one.arena.key, one.address, one.nbytes, one.device, ticket)
                for one in regions
            )
            door = self._doors[request.path]
            card = guest.news(door.name, door.card())
            guest.channel.send(Grant(ticket, hold_s, card, remote), deadline)
            ending, confirm = _until_done(guest.channel, door, regions, deadline)
            return confirm
        except PullTimeout as error:
            ending = Ending.EXPIRED
            raise LeaseExpired(f"{request.name!r} was lent for {hold_s} s: lease it for longer") from error
        finally:
            self._holdings.shelf.end(ticket, ending)

    def _refuse(self, channel: Connection, error: TransportError) -> None:
        if not channel.garbled:
            with suppress(TransportError):  # it is gone then, and needs no answer
                channel.send(refusal_of(error), Deadline.after(GREETING_S))


def _until_done(
    channel: Connection, door: DataPath, regions: Sequence[Region], deadline: Deadline
) -> tuple[Ending, bool]:
    """Wait for the puller's word: how the lease ended, and whether to confirm it. Send the bytes if it asks for them.

    Bytes that were sent need no word that they were pinned: had the lease ended before the last, it would not come.
    """
    match channel.receive(deadline):
        case ReleaseLease(read, confirm):
            return (Ending.READ if read else Ending.RELEASED), confirm
        case Read():
            door.send(channel, regions, deadline)
            return Ending.READ, False
        case other:
            raise WireError(
                f"{channel.peer} said {type(other).__name__} during a lease: compare the versions"
            )
