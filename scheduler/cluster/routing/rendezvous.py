"""Rendezvous (highest random weight) hashing: Thaler and Ravishankar, 1998. Needs no table, and a node that
comes or goes moves only its own adapters."""

from hashlib import blake2b

import numpy as np

from scheduler.cluster.routing.base import Ask, Loads, NoNodeReachable
from scheduler.cluster.state import RoutingTable


class RendezvousRouting:
    """The reachable node whose hash with the adapter's digest is highest."""

    def route(self, ask: Ask, table: RoutingTable, loads: Loads, rng: np.random.Generator) -> str:
        """Looks at neither table nor load, and does not draw."""
        if not loads:
            raise NoNodeReachable(ask.adapter)
        return max(loads, key=lambda node: blake2b(f"{ask.adapter.digest}\n{node}".encode()).digest())
