"""Choose by whom an adapter is served while its copies are on the way to where they should be."""

from collections.abc import Collection, Iterable, Mapping

from scheduler.cluster.coordinator.node_view import Copy
from scheduler.cluster.state import Shares, normalised

_WHOLE = 1 - 1e-9


def interim_shares(target: Shares, routes: Shares, copies: Mapping[str, Copy]) -> Shares:
    """Choose the shares to route by now. `copies` are those on nodes that may serve.

    Shares of `target` whose node has the adapter count. What is missing goes to those who serve it now by
    `routes`, as far as they have it; failing these, to the rest of the target. Failing that too, requests go to
    whoever has it, then to where it is coming, then to where it should come. Empty only if `target` is.
    """
    held = [node for node, copy in copies.items() if copy is Copy.HELD]
    ready = shares_on(held, target)
    ready_part = sum(part for _, part in ready)
    if ready_part >= _WHOLE:
        return target
    if former := normalised(shares_on(held, routes)):
        missing = 1 - ready_part
        return normalised([*ready, *((share.node, share.part * missing) for share in former)])
    if ready:
        return normalised(ready)
    if held:
        return evenly(held)
    pulling = [node for node, copy in copies.items() if copy is Copy.PULLING]
    return normalised(shares_on(pulling, target)) or evenly(pulling) or target


def shares_on(nodes: Collection[str], shares: Shares) -> list[tuple[str, float]]:
    """Keep the shares of these nodes, as (node, part)."""
    return [(share.node, share.part) for share in shares if share.node in nodes]


def evenly(nodes: Iterable[str]) -> Shares:
    """Return equal shares for these nodes."""
    return normalised((node, 1.0) for node in nodes)
