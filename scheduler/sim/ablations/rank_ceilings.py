"""Rank ceilings: which nodes may serve how large a rank, so that the busiest node is as idle as it can be.

Where kernels pad, a node's tokens all cost what its largest rank costs, so a node is described by its ceiling
c: it sustains OP[c] tokens/s of any ranks up to c. Adapters of rank k may go to the nodes with c ≥ k; these
sets are nested, so demand can be spread at utilisation t if and only if (Hall's condition, for nested sets)

    for every rank k:   Σ demand of ranks ≥ k   ≤   t · Σ OP[c] over the nodes with c ≥ k.

For a given t the fewest nodes at the highest ceiling, then at the next, is best: lowering a ceiling never
lowers what a node sustains. The least t is found by bisection. For alike nodes and ample memory this is
optimal over all placements; for unlike ones the nodes are raised in a given order.
"""

import numpy as np
from numpy.typing import NDArray

from scheduler.cluster.cost.model import Kernel
from scheduler.cluster.state import NodeState

_BISECTIONS = 40

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def rate_table(nodes: tuple[NodeState, ...], ranks: list[int]) -> Floats:
    """Return [nodes, ranks] the tokens/s that each node sustains of each rank alone. Nodes alike are computed
    once."""
    rows: dict[tuple[object, float], list[float]] = {}
    for state in nodes:
        key = state.operating_points, state.slowdown
        if key not in rows:
            rows[key] = [state.sustains(rank) for rank in ranks]
    return np.array([rows[state.operating_points, state.slowdown] for state in nodes])


def least_target(rates: Floats, demand: Floats, ceilings: Ints) -> float:
    """Return the utilisation that Hall's condition allows; infinite if a rank with demand has no node.

    `rates` is [nodes, ranks], `demand` [ranks] in tokens/s, `ceilings` [nodes] as indices of ranks.
    """
    own = rates[np.arange(len(ceilings)), ceilings]
    sustained = np.array([own[ceilings >= rank].sum() for rank in range(len(demand))])
    wanted = np.cumsum(demand[::-1])[::-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(wanted > 0, wanted / sustained, 0.0)
    return float(ratios.max())


def choose_ceilings(rates: Floats, demand: Floats, present: Ints) -> Ints:
    """Choose the ceilings [nodes] of least target.

    Nodes are raised in descending order of their `present` ceiling, so that few change.
    """
    order = np.argsort(-present, kind="stable")
    low, high = 0.0, 1.0
    best = _raised(rates, demand, order, high)
    while best is None:
        low, high = high, high * 4
        best = _raised(rates, demand, order, high)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        found = _raised(rates, demand, order, middle)
        if found is None:
            low = middle
        else:
            high, best = middle, found
    return best


def _raised(rates: Floats, demand: Floats, order: Ints, target: float) -> Ints | None:
    """Return ceilings under which `target` suffices, as few high ones as can be; None if there are none."""
    ceilings = np.zeros(len(order), dtype=np.int64)
    raised, sustained, wanted = 0, 0.0, 0.0
    for rank in range(len(demand) - 1, -1, -1):
        wanted += demand[rank]
        while sustained * target < wanted and raised < len(order):
            ceilings[order[raised]] = rank
            sustained += rates[order[raised], rank]
            raised += 1
        if sustained * target < wanted:
            return None
    return ceilings


def interference(rates: Floats, ceilings: Ints, kernel: Kernel) -> Floats:
    """Return [nodes, ranks] the seconds that one token of each rank takes of a node under its ceiling.

    They are infinite above the ceiling.
    """
    own = 1 / rates
    if not kernel.mixes:
        return own
    padded = np.take_along_axis(own, ceilings[:, None], axis=1)
    cost = padded + np.zeros_like(own) if kernel is Kernel.PADDED else (padded + own) / 2
    return np.where(np.arange(int(rates.shape[1]))[None, :] > ceilings[:, None], np.inf, cost)
