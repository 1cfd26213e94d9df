"""NetworkTransport: nodes in different processes or on different machines. One control connection, several doors.

Leases, trust and deadlines go over the control connection whichever door moves the bytes. The interface is asyncio;
what blocks runs in threads of its own, and a thread that has begun to move bytes always finishes its landing, even
when the coroutine that asked for it was cancelled.
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from transport.base import Address, Arena, Bring, Lease, Memory, Region, Usage
from transport.deadline import Deadline
from transport.door import AUTO, Door, choose
from transport.errors import (
    LeaseExpired,
    NotOffered,
    PullTimeout,
    RegionBusy,
    TransportClosed,
    TransportError,
    WireError,
)
from transport.holdings import Holdings
from transport.landings import Landing
from transport.links import Link, Links
from transport.security import Guard, Security
from transport.source import Source
from transport.wire import Grant, LeaseRequest, Release, Released

ANY_LOCAL_PORT = Address("127.0.0.1", 0)
LINKS_PER_PEER = 8
THREADS = 64
PARTING_S = 5.0

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class NetworkOptions:
    """Where a node listens, whom it trusts, which door it takes ("auto" or one's name), how long it lends."""

    security: Security
    listen: Address = ANY_LOCAL_PORT
    door: str = AUTO
    most_hold_s: float = 60.0


@dataclass(frozen=True, slots=True)
class _Visit:
    """An open lease at a peer: the link that carries it, and how the bytes will come."""

    link: Link
    lease: Lease
    door: Door
    card: str
    deadline: Deadline


class NetworkTransport:
    """One node on the network; `doors` in order of preference. Use it from one event loop."""

    def __init__(self, name: str, options: NetworkOptions, doors: Sequence[Door]) -> None:
        options.security.check_host(options.listen.host)
        self._holdings = Holdings(name)
        self._doors = tuple(doors)
        self._setting = options.door
        guard = Guard(options.security, self.node)
        self._links = Links(guard)
        self._source = Source(options.listen, guard, self._holdings, doors, options.most_hold_s)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="transport-pull")
        self._slots: dict[Address, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(LINKS_PER_PEER))
        self._visits: dict[int, tuple[_Visit, asyncio.TimerHandle]] = {}
        self._closed = False

    @property
    def node(self) -> str:
        """This node's name, unique per incarnation."""
        return self._holdings.node

    @property
    def address(self) -> Address:
        """Where it listens."""
        return self._source.address

    def register(self, memory: Memory) -> Arena:
        """See `Transport`; device memory is reachable only through a door that can."""
        arena = self._holdings.register(memory)
        for door in self._doors:
            door.register(arena)
        return arena

    def publish(self, name: str, regions: Sequence[Region]) -> None:
        """See `Transport`."""
        self._holdings.publish(name, regions)

    def withdraw(self, name: str) -> Future[None]:
        """See `Transport`."""
        return self._holdings.shelf.withdraw(name)

    def settled(self, region: Region) -> Future[None]:
        """See `Transport`."""
        return self._holdings.settled(region)

    def usage(self) -> Usage:
        """See `Transport`."""
        return self._holdings.usage()

    def lend_on_demand(self, bring: Bring) -> None:
        """See `Transport`."""
        self._holdings.bring = bring

    async def lease(self, peer: Address, name: str, hold_s: float) -> Lease:
        """See `Transport`. A peer grants at most LINKS_PER_PEER leases to this node at a time; further ones wait."""
        deadline = Deadline.after(hold_s)
        slot = self._slots[peer]
        try:
            await asyncio.wait_for(slot.acquire(), hold_s)
        except TimeoutError as error:
            raise PullTimeout(
                f"{peer}: {LINKS_PER_PEER} leases are open; pull or release them sooner"
            ) from error
        try:
            visit = await self._invitation(peer, name, hold_s, deadline)
        except BaseException:
            slot.release()
            raise
        patience_s = visit.lease.hold_s + PARTING_S  # the source ends it first, and says so
        expiry = asyncio.get_running_loop().call_later(patience_s, self._expire, visit.lease.ticket)
        self._visits[visit.lease.ticket] = visit, expiry
        return visit.lease

    async def pull(self, lease: Lease, into: Sequence[Region], timeout_s: float) -> None:
        """See `Transport`."""
        visit = self._take_visit(lease)
        try:
            landing = self._land(visit, into)
            reading = self._begin(partial(self._read, visit, landing, visit.deadline.at_most(timeout_s)))
            try:
                await _done(reading)
            except asyncio.CancelledError:
                visit.link.channel.abort()
                raise
        finally:
            self._slots[visit.link.peer].release()

    async def release(self, lease: Lease) -> None:
        """See `Transport`."""
        if lease.ticket in self._visits:
            visit = self._take_visit(lease)
            try:
                await _done(self._begin(partial(self._part, visit)))
            finally:
                self._slots[visit.link.peer].release()

    async def close(self) -> None:
        """See `Transport`. RegionBusy if bytes may still land: then the arenas must stay until the process ends."""
        if self._closed:
            return
        self._closed = True
        for ticket in list(self._visits):
            self._expire(ticket)
        self._links.close()
        await asyncio.to_thread(self._source.close)
        await asyncio.to_thread(self._threads.shutdown)
        settled = asyncio.wrap_future(self._holdings.landings.all_settled())
        try:
            await asyncio.wait_for(settled, PARTING_S)
        except TimeoutError as error:
            raise RegionBusy(
                "bytes of abandoned pulls may still land: keep the arenas until the process ends"
            ) from error
        for door in self._doors:
            door.close()

    async def _invitation(self, peer: Address, name: str, hold_s: float, deadline: Deadline) -> _Visit:
        visiting = self._begin(partial(self._visit, peer, name, hold_s, deadline))
        try:
            return await _done(visiting)
        except asyncio.CancelledError:
            visiting.add_done_callback(self._leave)
            raise

    def _land(self, visit: _Visit, into: Sequence[Region]) -> Landing:
        try:
            return self._holdings.land(visit.lease, into)
        except TransportError:
            self._begin(partial(self._part, visit))
            raise

    def _begin(self, work: Callable[[], R]) -> Future[R]:
        """Do `work` in a thread, to its end, whatever becomes of the caller."""
        if self._closed:
            raise TransportClosed(f"{self.node} is closed: open another transport")
        return self._threads.submit(work)

    def _visit(self, peer: Address, name: str, hold_s: float, deadline: Deadline) -> _Visit:
        """Ask `peer` for a lease, in a thread."""
        link = self._links.take(peer, deadline)
        try:
            door = choose(self._doors, link.doors, self._setting)
            link.channel.send(LeaseRequest(name, hold_s, door.name), deadline)
            grant = link.channel.expect(Grant, deadline)
            if any(region.node != link.node or region.key != grant.ticket for region in grant.regions):
                raise WireError(f"{peer} lends regions that are not its own: do not use it")
        except NotOffered:
            self._links.put(link)
            raise
        except TransportError:
            self._links.drop(link)
            raise
        lease = Lease(link.node, name, grant.ticket, grant.hold_s, grant.regions)
        return _Visit(link, lease, door, grant.card, deadline.at_most(grant.hold_s))

    def _read(self, visit: _Visit, landing: Landing, deadline: Deadline) -> None:
        """Pull, in a thread. The door ends the landing."""
        channel = visit.link.channel
        try:
            if channel.is_quiet():
                visit.door.read(channel, visit.lease, visit.card, landing, deadline)
            else:
                landing.end()
                channel.receive(Deadline.after(PARTING_S))  # raises why the source ended the lease
        except BaseException:
            self._links.drop(visit.link)  # the source ends the lease when it hears of it
            raise
        self._links.put(visit.link)
        self._holdings.count_pull(visit.door.name, visit.lease.nbytes)

    def _part(self, visit: _Visit) -> None:
        """Give a lease back, in a thread."""
        deadline = Deadline.after(PARTING_S)
        try:
            visit.link.channel.send(Release(read=False), deadline)
            visit.link.channel.expect(Released, deadline)
        except TransportError:
            self._links.drop(visit.link)  # which ends the lease as well
        else:
            self._links.put(visit.link)

    def _leave(self, visiting: Future[_Visit]) -> None:
        """Nobody waits for this lease any more."""
        if visiting.exception() is None:
            self._links.drop(visiting.result().link)

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
        self._links.drop(visit.link)
        self._slots[visit.link.peer].release()


async def _done(future: Future[R]) -> R:
    """Wait for the thread's result; it goes on if the waiter is cancelled."""
    return await asyncio.shield(asyncio.wrap_future(future))
