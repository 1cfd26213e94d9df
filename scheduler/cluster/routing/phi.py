"""Routing by φ alone: what the placement planned, in expectation."""

import numpy as np

from scheduler.cluster.routing.base import Ask, Loads, drawn, reachable_shares
from scheduler.cluster.state import RoutingTable


class PhiRouting:
    """One draw from the adapter's shares."""

    def route(self, ask: Ask, table: RoutingTable, loads: Loads, rng: np.random.Generator) -> str:
        """Does not look at load."""
        return drawn(reachable_shares(ask, table, loads), rng)
