"""Routing to the node with the fewest requests."""

import numpy as np

from scheduler.cluster.routing.base import Ask, Loads, reachable_shares
from scheduler.cluster.state import RoutingTable


class LeastLoadedRouting:
    """Among the nodes of the adapter's shares, whatever their parts; ties go to the first."""

    def route(self, ask: Ask, table: RoutingTable, loads: Loads, rng: np.random.Generator) -> str:
        """Does not draw."""
        nodes = (share.node for share in reachable_shares(ask, table, loads))
        return min(nodes, key=lambda node: loads[node].requests)
