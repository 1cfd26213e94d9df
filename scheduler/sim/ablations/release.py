"""What overloaded nodes should give away: a minimum-cost flow from where adapters are to where they could be.

All tokens/s of one rank on one node are one flow. Moving a token to any other node costs the same, its share
of the adapter's bytes. So flows need not go node to node but through one pool per rank:

    node, rank  --out, bytes-->  pool of rank  --in, free-->  any node whose ceiling allows the rank

which keeps the program at 2·nodes·ranks variables. Utilisation and memory of each node are side constraints;
what cannot be met is bought at a price above all bytes. Solved by HiGHS.
"""

from dataclasses import dataclass
from typing import Any, cast

import numpy as np

# scipy has no stubs: casts state the types of what it returns.
from scipy.optimize import linprog  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]
from scipy.sparse import (  # pyright: ignore[reportMissingTypeStubs]
    bmat,  # pyright: ignore[reportUnknownVariableType]
    csr_matrix,
    identity,  # pyright: ignore[reportUnknownVariableType]
    kron,  # pyright: ignore[reportUnknownVariableType]
)

from scheduler.sim.ablations.rank_ceilings import Floats

_BEYOND_PRICE = 1e4  # of exceeding a node's time or memory, in units of the bytes of everything


@dataclass(frozen=True, slots=True)
class Overload:
    """Where things are. `tokens` and `nbytes` [nodes, ranks] of what may stay where it is; `pool_tokens` and
    `pool_bytes` [ranks] of what has no place yet; `free_bytes` [nodes] is memory less all that is there."""

    tokens: Floats
    nbytes: Floats
    pool_tokens: Floats
    pool_bytes: Floats
    free_bytes: Floats


@dataclass(frozen=True, slots=True)
class CheapestRelease:
    """`tokens` [nodes, ranks] to give away, and the utilisation that then suffices everywhere."""

    tokens: Floats
    target: float


def cheapest_release(overload: Overload, seconds: Floats, target: float) -> CheapestRelease:
    """Find the fewest bytes to move so that no node exceeds `target` (above 0), or as little above it as can
    be.

    `seconds` [nodes, ranks] is a token's cost on a node, infinite where the rank is not allowed.
    """
    nodes, ranks = overload.tokens.shape
    allowed = np.isfinite(seconds)
    cost = np.where(allowed, seconds, 0.0)
    total_tokens = max(float(overload.tokens.sum() + overload.pool_tokens.sum()), 1e-12)
    total_bytes = max(float(overload.nbytes.sum() + overload.pool_bytes.sum()), 1.0)
    out_bytes = _ratio(overload.nbytes, overload.tokens) * total_tokens / total_bytes
    in_bytes = _ratio(
        overload.nbytes.sum(0) + overload.pool_bytes, overload.tokens.sum(0) + overload.pool_tokens
    )
    in_bytes = np.tile(in_bytes * total_tokens / total_bytes, (nodes, 1))
    time = _by_node(cost * total_tokens / target)
    beyond = csr_matrix(-np.ones((nodes, 1)))
    limits = _blocks([[-time, time, beyond, None], [-_by_node(out_bytes), _by_node(in_bytes), None, beyond]])
    room = np.concatenate([1 - (cost * overload.tokens).sum(1) / target, overload.free_bytes / total_bytes])
    through = kron(np.ones((1, nodes)), identity(ranks))
    balance = _blocks([[through, -through, csr_matrix((ranks, 2))]])
    upper = np.concatenate(
        [overload.tokens.ravel() / total_tokens, np.where(allowed, np.inf, 0.0).ravel(), [np.inf, np.inf]]
    )
    answer = linprog(
        c=np.concatenate([out_bytes.ravel(), np.zeros(nodes * ranks), [_BEYOND_PRICE, _BEYOND_PRICE]]),
        A_ub=limits,
        b_ub=room,
        A_eq=balance,
        b_eq=-overload.pool_tokens / total_tokens,
        bounds=np.column_stack([np.zeros(len(upper)), upper]),
        method="highs",
    )
    flow = cast("Floats | None", answer.x)
    assert flow is not None, f"a flow with bought excess always exists, but: {answer.message}"
    out = flow[: nodes * ranks].reshape(nodes, ranks) * total_tokens
    return CheapestRelease(out, target * (1 + float(flow[-2])))


def _blocks(blocks: list[list[Any]]) -> csr_matrix:
    return cast("csr_matrix", bmat(blocks).tocsr())


def _ratio(above: Floats, below: Floats) -> Floats:
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def _by_node(values: Floats) -> csr_matrix:
    """Return [nodes, nodes * ranks]: row n holds node n's values at its own columns."""
    rows = np.repeat(np.arange(len(values)), int(values.shape[1]))
    return csr_matrix((values.ravel(), (rows, np.arange(values.size))), shape=(len(values), values.size))
