"""A cluster in virtual time: real schedulers, agents, routers' decisions and coordinator; simulated steps,
network, links and clients. The same spec, arrivals and seed give the same history, byte for byte.
"""

from collections.abc import Iterable, Mapping

import numpy as np

from scheduler.sim.clients import Clients
from scheduler.sim.clock import Clock
from scheduler.sim.cluster import SimCluster
from scheduler.sim.faults import FaultInjector
from scheduler.sim.outcome import History, Record
from scheduler.sim.spec import SimulatorSpec
from scheduler.sim.workload.trace import Arrival

_SECOND = 1.0


class Simulator:
    """Runs arrivals through a cluster. With `audit` everything that must hold is checked after every event,
    else once a virtual second."""

    def __init__(
        self, spec: SimulatorSpec, seed: int, audit: bool = False, keep_history: bool = False
    ) -> None:
        network_rng, client_rng, routing_rng = np.random.default_rng(seed).spawn(3)
        self.clock, self.history = Clock(), History(keep_history)
        self.cluster = SimCluster(spec, self.clock, self.history, (network_rng, routing_rng))
        self._audit = audit
        self._clients = Clients(
            self.clock, self.history, self.cluster.routers, client_rng, spec.client_retries
        )
        self.cluster.begin(self._clients.hears)
        if not audit:
            self.cluster.every(_SECOND, 0.0, self.check)
        faults = FaultInjector(self.cluster, self._clients, self.clock, self.history, spec.times.detect_s)
        for fault in spec.faults:
            faults.expect(fault)

    @property
    def records(self) -> Mapping[str, Record]:
        """Return what became of each request, by its name."""
        return self._clients.records

    def run(self, arrivals: Iterable[Arrival], seconds: float, drain_s: float = 600.0) -> None:
        """Let `arrivals` come and `seconds` pass, then up to `drain_s` until all is answered."""
        unanswered = self._clients.router_of
        self._clients.expect(iter(arrivals))
        self.clock.run(seconds, self._after_each)
        while unanswered and self.clock.now < seconds + drain_s:
            self.clock.run(self.clock.now + _SECOND, self._after_each)
        self.check()
        assert not unanswered, f"{len(unanswered)} requests were not answered in {drain_s} s after the last"

    def check(self) -> None:
        """Check what must hold after every event."""
        for node in self.cluster.nodes.values():
            if node.up:
                node.check()
        for name, home in self._clients.router_of.items():
            router = self.cluster.routers[home]
            assert router.up, f"{name} is lost with {home}"
            assert router.has(name), f"{name} is lost: {home} does not know it"

    def _after_each(self) -> None:
        if self._audit:
            self.check()
