"""Rendezvous (highest random weight) hashing: Thaler and Ravishankar, 1998. Needs no table, and a node that
comes or goes moves only its own adapters."""

from collections.abc import Iterable
from hashlib import blake2b

import numpy as np

from lora.adapter import AdapterRef
from scheduler.cluster.routing.base import Ask, Loads, NoNodeReachable
from scheduler.cluster.state import RoutingTable


def highest(adapter: AdapterRef, nodes: Iterable[str]) -> str:
    """The node whose hash with the adapter's digest is highest."""
    return max(nodes, key=lambda node: blake2b(f"{adapter.digest}\n{node}".encode()).digest())


class RendezvousRouting:
    """The reachable node whose hash with the adapter's digest is highest."""

    def route(self, ask: Ask, table: RoutingTable, loads: Loads, rng: np.random.Generator) -> str:
        """Looks at neither table nor load, and does not draw."""
        if not loads:
            raise NoNodeReachable(ask.adapter)
        return highest(ask.adapter, loads)
