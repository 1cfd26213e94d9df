"""Order requests that wait at the door: by priority, then tenants by turns, then each tenant's adapters by turns.

Start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996) on two levels. A tenant's turn is when what it was
given before, divided by its weight, is least. Whoever was idle begins where the others are now, so that nobody
saves turns up. Requests of one adapter go in the order in which they came.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush, heapreplace


@dataclass(frozen=True, slots=True)
class QueuedRequest:
    """A request that waits. `work_s` is what it will cost a node, in seconds; lower `priority` goes first.

    It is of no use to send it after `expires_s`.
    """

    request_id: str
    tenant: str
    adapter: str
    work_s: float
    expires_s: float
    priority: int = 0


@dataclass(slots=True)
class _Flow:
    """Requests of one adapter of one tenant, and when its next turn is in the tenant's virtual time."""

    turn: float = 0.0
    requests: deque[QueuedRequest] = field(default_factory=deque[QueuedRequest])


@dataclass(slots=True)
class _Tenant:
    """One tenant's flows, and when its next turn is in the band's virtual time."""

    turn: float = 0.0
    virtual: float = 0.0
    work_s: float = 0.0
    waiting: int = 0
    flows: dict[str, _Flow] = field(default_factory=dict[str, _Flow])


@dataclass(slots=True)
class _Band:
    """All that waits at one priority."""

    virtual: float = 0.0
    tenants: dict[str, _Tenant] = field(default_factory=dict[str, _Tenant])


class FairQueue:
    """Owner of what waits. Tenants not named in `weights` weigh 1."""

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._weights = dict(weights or {})
        self._bands: dict[int, _Band] = {}
        self._waiting: dict[str, QueuedRequest] = {}
        self._expiries: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._waiting

    @property
    def next_expiry_s(self) -> float:
        """When the first of those that wait expires; infinity if none waits."""
        while self._expiries and self._expiries[0][1] not in self._waiting:
            heappop(self._expiries)
        return self._expiries[0][0] if self._expiries else float("inf")

    def weigh(self, weights: Mapping[str, float]) -> None:
        """Weigh tenants so from now on."""
        self._weights = dict(weights)

    def work_before_s(self, request: QueuedRequest) -> float:
        """Return the work that will go before `request` if it is added now.

        Those of lower priority, and tenants that had more than their turn, will not.
        """
        total = 0.0
        for priority, band in self._bands.items():
            if priority < request.priority:
                total += sum(tenant.work_s for tenant in band.tenants.values())
        band = self._bands.get(request.priority)
        if band is None:
            return total
        own = band.tenants.get(request.tenant)
        ahead = request.work_s + (own.work_s if own is not None else 0.0)
        weight = self._weight(request.tenant)
        for name, tenant in band.tenants.items():
            share = tenant.work_s if name == request.tenant else ahead * self._weight(name) / weight
            total += min(tenant.work_s, share)
        return total

    def add(self, request: QueuedRequest) -> None:
        """Queue a request whose id is not queued yet."""
        assert request.request_id not in self._waiting, f"{request.request_id!r} waits already"
        band = self._bands.setdefault(request.priority, _Band())
        tenant = band.tenants.setdefault(request.tenant, _Tenant(turn=band.virtual))
        flow = tenant.flows.setdefault(request.adapter, _Flow(turn=tenant.virtual))
        if not flow.requests:
            flow.turn = max(flow.turn, tenant.virtual)
        if not tenant.waiting:
            tenant.turn = max(tenant.turn, band.virtual)
        flow.requests.append(request)
        tenant.work_s += request.work_s
        tenant.waiting += 1
        self._waiting[request.request_id] = request
        heappush(self._expiries, (request.expires_s, request.request_id))

    def remove(self, request_id: str) -> QueuedRequest | None:
        """Take a request out that was not sent; None if it does not wait."""
        request = self._waiting.pop(request_id, None)
        if request is not None:
            band = self._bands[request.priority]
            tenant = band.tenants[request.tenant]
            tenant.flows[request.adapter].requests.remove(request)
            _settle(tenant, request)
        return request

    def expired(self, now: float) -> list[QueuedRequest]:
        """Take out those that expired by `now`, the earliest first."""
        gone: list[QueuedRequest] = []
        while self.next_expiry_s <= now:
            _, request_id = heappop(self._expiries)
            request = self.remove(request_id)
            assert request is not None, f"{request_id!r} does not wait"
            gone.append(request)
        return gone

    def serve(self, send: Callable[[QueuedRequest], bool], most_tries: int) -> None:
        """Offer requests to `send` in order, and take out those that it takes.

        Where it does not take the first of an adapter, the adapter sits this call out. It is asked at most
        `most_tries` times.
        """
        tries = most_tries
        for priority in sorted(self._bands):
            for request in self._turns(self._bands[priority], send):
                tries -= 1
                if request is not None:
                    del self._waiting[request.request_id]
                if not tries:
                    return

    def _turns(self, band: _Band, send: Callable[[QueuedRequest], bool]) -> Iterator[QueuedRequest | None]:
        """Yield, for each request that was offered, it if it was taken, else None."""
        _forget_idle(band)
        due = [(tenant.turn, name) for name, tenant in band.tenants.items() if tenant.waiting]
        heapify(due)
        heads: dict[str, list[tuple[float, str]]] = {}
        while due:
            name = due[0][1]
            tenant = band.tenants[name]
            mine = heads.get(name)
            if mine is None:
                mine = heads[name] = [(flow.turn, key) for key, flow in tenant.flows.items() if flow.requests]
                heapify(mine)
            flow = tenant.flows[mine[0][1]]
            request = flow.requests[0]
            taken = send(request)
            if taken:
                flow.requests.popleft()
                self._charge(band, tenant, flow, request)
                _settle(tenant, request)
            if taken and flow.requests:
                heapreplace(mine, (flow.turn, request.adapter))
            else:
                heappop(mine)
            if mine:
                heapreplace(due, (tenant.turn, name))
            else:
                heappop(due)
            yield request if taken else None

    def _charge(self, band: _Band, tenant: _Tenant, flow: _Flow, request: QueuedRequest) -> None:
        tenant.virtual, band.virtual = flow.turn, max(band.virtual, tenant.turn)
        flow.turn += request.work_s
        tenant.turn += request.work_s / self._weight(request.tenant)

    def _weight(self, tenant: str) -> float:
        return self._weights.get(tenant, 1.0)


def _settle(tenant: _Tenant, request: QueuedRequest) -> None:
    """Account for a request that left."""
    tenant.work_s -= request.work_s
    tenant.waiting -= 1
    if not tenant.waiting:
        tenant.work_s = 0.0
        tenant.flows.clear()


def _forget_idle(band: _Band) -> None:
    """Forget the tenants that wait for nothing and are not ahead of the others."""
    idle = [name for name, each in band.tenants.items() if not each.waiting and each.turn <= band.virtual]
    for name in idle:
        del band.tenants[name]
