"""Ask other nodes: lease what they publish, and see the bytes into their destinations.

Coroutines of one event loop decide; what blocks runs in worker threads. A thread that has begun to move bytes
always finishes, even when the coroutine that asked for it was cancelled. Pooled connections are taken, kept and
left by the coroutines alone.
"""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from transport.base import Address, Lease, Region
from transport.connection_pool import ConnectionPool, PooledConnection
from transport.control.connection import Deadline
from transport.control.messages import Grant, LeaseReleased, LeaseRequest, Message, ReleaseLease
from transport.control.security import Authenticator
from transport.control.threads import WorkerThreads
from transport.errors import (
    LeaseExpired,
    NotOffered,
    PathUnavailable,
    PullTimeout,
    RegionRefused,
    TransportClosed,
    TransportError,
    WireError,
)
from transport.memory.destinations import Destination
from transport.memory.local_memory import LocalMemory
from transport.paths.base import DataPath

LINKS_PER_PEER = 8
THREADS = 64
PARTING_S = 5.0

log = logging.getLogger(__name__)

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class _Call:
    """A lease that was asked for over `link`, for `hold_s`, which are over at the deadline or later; with the bytes
    if `eager`. `doors` would do, the first is asked for."""

    link: PooledConnection
    name: str
    doors: tuple[DataPath, ...]
    hold_s: float
    deadline: Deadline
    eager: bool

    @property
    def door(self) -> DataPath:
        """The one that was asked for."""
        return self.doors[0]

    def say(self) -> None:
        """Put it to the source, which does not wait: a few bytes on a link that was idle."""
        request = LeaseRequest(self.name, self.hold_s, self.door.name)
        self.link.channel.send_all([request, *(self.door.cue if self.eager else ())], self.deadline)

    def without_door(self) -> "_Call | None":
        """The same, asking for the next door; None if there is no other."""
        return replace(self, doors=self.doors[1:]) if len(self.doors) > 1 else None


@dataclass(frozen=True, slots=True)
class _Visit:
    """An open lease at a peer: the link that carries it, and how the bytes come. It is open until the deadline."""

    link: PooledConnection
    lease: Lease
    door: DataPath
    card: str
    deadline: Deadline


class TransportClient:
    """One node's visits to its peers; `doors` in order of preference, `setting` as for `usable`."""

    def __init__(
        self, guard: Authenticator, holdings: LocalMemory, doors: Sequence[DataPath], setting: str
    ) -> None:
        self._holdings = holdings
        self._links = ConnectionPool(guard, doors, setting)
        self._crew = WorkerThreads(THREADS)
        self._slots: dict[Address, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(LINKS_PER_PEER))
        self._visits: dict[int, tuple[_Visit, asyncio.TimerHandle]] = {}
        self._closed = False

    async def lease(self, peer: Address, name: str, hold_s: float) -> Lease:
        """See `Transport`. A peer grants at most LINKS_PER_PEER leases to this node at a time; further ones wait."""
        link, deadline = await self._take_link(peer, hold_s)
        with self._leaving(link):
            question = _ask(link, name, deadline)
        visit = await self._with(link, partial(_hear, question))
        patience_s = visit.lease.hold_s + PARTING_S  # the source ends it first, and says so
        expiry = asyncio.get_running_loop().call_later(patience_s, self._expire, visit.lease.ticket)
        self._visits[visit.lease.ticket] = visit, expiry
        return visit.lease

    async def pull(self, lease: Lease, into: Sequence[Region], timeout_s: float) -> None:
        """See `Transport`."""
        visit = self._take_visit(lease)
        try:
            landing = self._holdings.land(into)
            with landing.ending():
                landing.check(lease)
                if not all(visit.door.carries(region.device) for region in into):
                    raise RegionRefused(
                        f"{visit.door.name!r} does not carry the destination's device: fetch instead"
                    )
        except TransportError:
            await self._part(visit)
            raise
        deadline = visit.deadline.at_most(timeout_s)
        last_words = await self._with(visit.link, partial(_pull, visit, landing, deadline))
        self._keep(visit.link, last_words)
        self._holdings.count_pull(visit.door.name, lease.nbytes)

    async def fetch(self, peer: Address, name: str, into: Sequence[Region], timeout_s: float) -> None:
        """See `Transport`. One round trip; the stream's bytes come with the grant."""
        link, deadline = await self._take_link(peer, timeout_s)
        with self._leaving(link):
            landing = self._holdings.land(into)
            with landing.ending():
                question = _ask(link, name, deadline, into)
        door, last_words = await self._with(link, partial(_fetch, question, landing))
        self._keep(link, last_words)
        self._holdings.count_pull(door.name, landing.nbytes)

    async def release(self, lease: Lease) -> None:
        """See `Transport`."""
        if lease.ticket in self._visits:
            await self._part(self._take_visit(lease))

    async def close(self) -> None:
        """Hang up on everybody; what runs ends with an error."""
        self._closed = True
        for ticket in list(self._visits):
            self._expire(ticket)
        self._links.close()
        await asyncio.to_thread(self._crew.dismiss)

    async def _take_link(self, peer: Address, within_s: float) -> tuple[PooledConnection, Deadline]:
        """A link to `peer` that works, as far as can be seen, and when `within_s` are over. It must be kept or left."""
        if self._closed:
            raise TransportClosed("this transport is closed: open another")
        deadline, slot = Deadline.after(within_s), self._slots[peer]
        try:
            await (asyncio.wait_for(slot.acquire(), within_s) if slot.locked() else slot.acquire())
        except TimeoutError as error:
            raise PullTimeout(
                f"{peer}: {LINKS_PER_PEER} leases are open; pull or release them sooner"
            ) from error
        try:
            return self._links.take(peer) or await self._dial(peer, deadline), deadline
        except BaseException:
            slot.release()
            raise

    async def _dial(self, peer: Address, deadline: Deadline) -> PooledConnection:
        dialling = self._do(partial(self._links.dial, peer, deadline))
        try:
            return await asyncio.shield(dialling)
        except asyncio.CancelledError:
            dialling.add_done_callback(self._hang_up)
            raise

    async def _with(self, link: PooledConnection, work: Callable[[], R]) -> R:
        """Do `work` with `link` in a thread; leave the link if it fails, in the end also if nobody waits for it."""
        with self._leaving(link):
            doing = self._do(work)
        try:
            return await asyncio.shield(doing)
        except asyncio.CancelledError:
            link.channel.abort()
            doing.add_done_callback(lambda done: self._leave_after(done, link))
            raise
        except NotOffered:
            self._keep(link)
            raise
        except BaseException:
            self._leave(link)  # the source ends the lease when it hears of it
            raise

    def _do(self, work: Callable[[], R]) -> asyncio.Future[R]:
        if self._closed:
            raise TransportClosed("this transport is closed: open another")
        return self._crew.do(work)

    async def _part(self, visit: _Visit) -> None:
        """Give a lease back."""
        with suppress(TransportError):  # the link is left then, which ends the lease as well
            await self._with(visit.link, partial(_release, visit.link))
            self._keep(visit.link)

    def _take_visit(self, lease: Lease) -> _Visit:
        if lease.ticket not in self._visits:
            raise LeaseExpired(f"{lease.name!r}: this lease has ended; lease again")
        visit, expiry = self._visits.pop(lease.ticket)
        expiry.cancel()
        return visit

    def _expire(self, ticket: int) -> None:
        """Nobody pulled or released it in time."""
        visit, expiry = self._visits.pop(ticket)
        expiry.cancel()
        self._leave(visit.link)

    def _keep(self, link: PooledConnection, last_words: Sequence[Message] = ()) -> None:
        """The exchange ended well: the next may use the link, once `last_words` are said. Whoever waits goes first."""
        if last_words:
            asyncio.get_running_loop().call_soon(self._conclude, link, last_words)
            return
        self._links.put(link)
        self._slots[link.peer].release()

    def _conclude(self, link: PooledConnection, last_words: Sequence[Message]) -> None:
        try:
            link.channel.send_all(last_words, Deadline.after(PARTING_S))
        except TransportError as error:
            log.info(
                "%s did not hear the end of a lease, and will see it from the hang-up: %s", link.peer, error
            )
            self._leave(link)
        else:
            self._keep(link)

    def _leave(self, link: PooledConnection) -> None:
        """Hang up."""
        self._links.drop(link)
        self._slots[link.peer].release()

    @contextmanager
    def _leaving(self, link: PooledConnection) -> Iterator[None]:
        """Leave the link if this fails."""
        try:
            yield
        except BaseException:
            self._leave(link)
            raise

    def _leave_after(self, done: asyncio.Future[R], link: PooledConnection) -> None:
        if not done.cancelled():
            done.exception()  # nobody is left to hear it
        self._leave(link)

    def _hang_up(self, dialled: asyncio.Future[PooledConnection]) -> None:
        if not dialled.cancelled() and dialled.exception() is None:
            self._links.drop(dialled.result())


def _ask(
    link: PooledConnection, name: str, deadline: Deadline, into: Sequence[Region] | None = None
) -> _Call:
    """Ask for a lease; for the bytes as well if `into` says where they go, which decides on the doors that would do."""
    try:
        hold_s = deadline.left_s()
    except TimeoutError as error:
        raise PullTimeout(f"{link.peer}: no time is left to ask; allow more") from error
    devices = {region.device for region in into or ()}
    doors = tuple(door for door in link.doors if all(map(door.carries, devices)))
    if not doors:
        raise PathUnavailable(
            f"no door to {link.peer} carries devices {sorted(devices)}: pull into host memory"
        )
    question = _Call(link, name, doors, hold_s, deadline, into is not None)
    question.say()
    return question


def _hear(question: _Call) -> _Visit:
    """Wait for the answer."""
    link = question.link
    try:
        grant = link.channel.expect(Grant, question.deadline)
    except PathUnavailable:
        other = question.without_door()
        if other is None:
            raise
        other.say()
        return _hear(other)
    if any(region.node != link.node or region.key != grant.ticket for region in grant.regions):
        raise WireError(f"{link.peer} lends regions that are not its own: do not use it")
    lease = Lease(link.node, question.name, grant.ticket, grant.hold_s, grant.regions)
    if grant.metadata:
        link.cards[question.door.name] = grant.metadata
    # The source counts from when it heard the question, so this is over before its lease is.
    deadline = question.deadline.sooner(max(0.0, question.hold_s - grant.hold_s))
    return _Visit(link, lease, question.door, link.cards.get(question.door.name, ""), deadline)


def _fetch(question: _Call, landing: Destination) -> tuple[DataPath, Sequence[Message]]:
    """Wait for the answer and read. The landing ends, now or later."""
    with landing.ending():
        visit = _hear(question)
        landing.check(visit.lease)
    last_words = visit.door.read(visit.link.channel, visit.lease, visit.card, landing, visit.deadline)
    return visit.door, last_words


def _pull(visit: _Visit, landing: Destination, deadline: Deadline) -> Sequence[Message]:
    """Read what was leased. The landing ends, now or later."""
    channel = visit.link.channel
    with landing.ending():
        if not channel.is_quiet():
            channel.receive(Deadline.after(PARTING_S))  # raises why the source ended the lease
        if visit.deadline.passed():  # whatever the source has said of it so far
            raise LeaseExpired(
                f"{visit.lease.name!r} was lent for {visit.lease.hold_s} s: lease it for longer"
            )
        channel.send_all(visit.door.cue, deadline)
    return visit.door.read(channel, visit.lease, visit.card, landing, deadline)


def _release(link: PooledConnection) -> None:
    deadline = Deadline.after(PARTING_S)
    link.channel.send(ReleaseLease(read=False, confirm=True), deadline)
    link.channel.expect(LeaseReleased, deadline)
