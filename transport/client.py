"""Ask other nodes: lease what they publish, and see the bytes into their destinations.

Coroutines of one event loop decide; what blocks runs in worker threads. A thread that has begun to move bytes always
finishes, even when the coroutine that asked for it was cancelled. The coroutines alone take connections from the
pool, and give each back: kept for the next lease, or dropped.
"""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import TypeVar

from transport.base import Address, Lease, Region
from transport.connection_pool import ConnectionPool, PooledConnection
from transport.control.connection import Deadline
from transport.control.messages import Message
from transport.control.security import Authenticator
from transport.control.threads import WorkerThreads, run_apart
from transport.errors import LeaseExpired, NotOffered, PullTimeout, TransportClosed, TransportError
from transport.lease_protocol import LAST_EXCHANGE_S, OpenLease, PendingLease
from transport.memory.local_memory import LocalMemory
from transport.paths.base import DataPath

LEASES_PER_PEER = 8
THREADS = 64

log = logging.getLogger(__name__)

R = TypeVar("R")


class TransportClient:
    """One node's leases at its peers; `paths` in order of preference, `setting` as for `usable`."""

    def __init__(
        self, authenticator: Authenticator, memory: LocalMemory, paths: Sequence[DataPath], setting: str
    ) -> None:
        self._memory = memory
        self._pool = ConnectionPool(authenticator, paths, setting)
        self._threads = WorkerThreads(THREADS)
        self._slots: dict[Address, asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(LEASES_PER_PEER)
        )
        self._leases: dict[int, tuple[OpenLease, asyncio.TimerHandle]] = {}
        self._closed = False

    async def lease(self, peer: Address, name: str, hold_s: float) -> Lease:
        """Lease as `Transport` says. At most LEASES_PER_PEER leases of a peer are open at a time; further ones wait."""
        pooled, deadline = await self._take(peer, hold_s)
        with self._dropped_on_error(pooled):
            pending = PendingLease.ask(pooled, name, deadline)
        granted = await self._use(pooled, pending.grant)
        patience_s = granted.lease.hold_s + LAST_EXCHANGE_S  # the source ends it first, and says so
        expiry = asyncio.get_running_loop().call_later(patience_s, self._expire, granted.lease.ticket)
        self._leases[granted.lease.ticket] = granted, expiry
        return granted.lease

    async def pull(self, lease: Lease, into: Sequence[Region], timeout_s: float) -> None:
        """Pull as `Transport` says."""
        granted = self._take_lease(lease)
        try:
            destination = self._memory.claim(into)
            with destination.ended_on_error():
                granted.check(destination)
        except TransportError:
            await self._release(granted)
            raise
        deadline = granted.deadline.at_most(timeout_s)
        unsaid = await self._use(granted.pooled, partial(granted.pull, destination, deadline))
        self._keep(granted.pooled, unsaid)
        self._memory.count_pull(granted.path.name, lease.nbytes)

    async def fetch(self, peer: Address, name: str, into: Sequence[Region], timeout_s: float) -> None:
        """Fetch as `Transport` says. One round trip; the stream's bytes come with the grant."""
        pooled, deadline = await self._take(peer, timeout_s)
        with self._dropped_on_error(pooled):
            destination = self._memory.claim(into)
            with destination.ended_on_error():
                pending = PendingLease.ask(pooled, name, deadline, into)
        path, unsaid = await self._use(pooled, partial(pending.fetch, destination))
        self._keep(pooled, unsaid)
        self._memory.count_pull(path.name, destination.nbytes)

    async def release(self, lease: Lease) -> None:
        """Release as `Transport` says."""
        if lease.ticket in self._leases:
            await self._release(self._take_lease(lease))

    async def close(self) -> None:
        """Hang up on everybody; what runs ends with an error."""
        self._closed = True
        for ticket in list(self._leases):
            self._expire(ticket)
        self._pool.close()
        await run_apart(self._threads.shutdown)

    async def _take(self, peer: Address, within_s: float) -> tuple[PooledConnection, Deadline]:
        """Take a connection that works, as far as can be seen, to be kept or dropped; and when `within_s` are over."""
        if self._closed:
            raise TransportClosed("this transport is closed: open another")
        deadline, slot = Deadline.after(within_s), self._slots[peer]
        try:
            async with asyncio.timeout(within_s):
                await slot.acquire()
        except TimeoutError as error:
            raise PullTimeout(
                f"{peer}: {LEASES_PER_PEER} leases are open; pull or release them sooner"
            ) from error
        try:
            return self._pool.take(peer) or await self._dial(peer, deadline), deadline
        except BaseException:
            slot.release()
            raise

    async def _dial(self, peer: Address, deadline: Deadline) -> PooledConnection:
        dialling = self._submit(partial(self._pool.dial, peer, deadline))
        try:
            return await asyncio.shield(dialling)
        except asyncio.CancelledError:
            dialling.add_done_callback(self._hang_up)
            raise

    async def _use(self, pooled: PooledConnection, work: Callable[[], R]) -> R:
        """Do `work` in a thread; drop the connection if it fails, in the end also if nobody waits for it."""
        with self._dropped_on_error(pooled):
            doing = self._submit(work)
        try:
            return await asyncio.shield(doing)
        except asyncio.CancelledError:
            pooled.connection.abort()
            doing.add_done_callback(lambda done: self._drop_after(done, pooled))
            raise
        except NotOffered:
            self._keep(pooled)
            raise
        except BaseException:
            self._drop(pooled)  # the source ends the lease when it hears of it
            raise

    def _submit(self, work: Callable[[], R]) -> asyncio.Future[R]:
        if self._closed:
            raise TransportClosed("this transport is closed: open another")
        return self._threads.submit(work)

    async def _release(self, granted: OpenLease) -> None:
        with suppress(TransportError):  # the connection is dropped then, which ends the lease as well
            await self._use(granted.pooled, granted.release)
            self._keep(granted.pooled)

    def _take_lease(self, lease: Lease) -> OpenLease:
        if lease.ticket not in self._leases:
            raise LeaseExpired(f"{lease.name!r}: this lease has ended; lease again")
        granted, expiry = self._leases.pop(lease.ticket)
        expiry.cancel()
        return granted

    def _expire(self, ticket: int) -> None:
        """End a lease that nobody pulled or released in time."""
        granted, expiry = self._leases.pop(ticket)
        expiry.cancel()
        self._drop(granted.pooled)

    def _keep(self, pooled: PooledConnection, unsaid: Sequence[Message] = ()) -> None:
        """Keep the connection for the next lease, once `unsaid` is said. Whoever waits for a result goes first."""
        if unsaid:
            asyncio.get_running_loop().call_soon(self._say_and_keep, pooled, unsaid)
            return
        self._pool.put(pooled)
        self._slots[pooled.peer].release()

    def _say_and_keep(self, pooled: PooledConnection, unsaid: Sequence[Message]) -> None:
        try:
            pooled.connection.send_all(unsaid, Deadline.after(LAST_EXCHANGE_S))
        except TransportError as error:
            log.info(
                "%s did not hear the end of a lease, and will see it from the hang-up: %s", pooled.peer, error
            )
            self._drop(pooled)
        else:
            self._keep(pooled)

    def _drop(self, pooled: PooledConnection) -> None:
        """Hang up."""
        self._pool.drop(pooled)
        self._slots[pooled.peer].release()

    @contextmanager
    def _dropped_on_error(self, pooled: PooledConnection) -> Generator[None]:
        try:
            yield
        except BaseException:
            self._drop(pooled)
            raise

    def _drop_after(self, done: asyncio.Future[R], pooled: PooledConnection) -> None:
        if not done.cancelled():
            done.exception()  # nobody is left to hear it
        self._drop(pooled)

    def _hang_up(self, dialled: asyncio.Future[PooledConnection]) -> None:
        if not dialled.cancelled() and dialled.exception() is None:
            self._pool.drop(dialled.result())
