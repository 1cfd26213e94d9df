"""From the placement that is to the placement to be: where requests go while bytes are still on their way.

Add before remove: a share moves when its new home has the adapter, and until then whoever served it stands
in.
"""

from collections.abc import Mapping

from scheduler.cluster.fleet import Copy
from scheduler.cluster.state import Shares, normalised

_WHOLE = 1 - 1e-9


def interim_shares(target: Shares, routes: Shares, copies: Mapping[str, Copy]) -> Shares:
    """The shares to route by now. `copies` are those on nodes that may serve.

    Shares of `target` whose node has the adapter count; what is missing goes to those who serve it now by
    `routes`, as far as they have it; failing these, to the rest of the target, then to whoever has it, then
    to where it is coming, then to where it should come. Empty only if `target` is.
    """
    having = [node for node, copy in copies.items() if copy is Copy.HELD]
    ready = [(share.node, share.part) for share in target if share.node in having]
    missing = 1 - sum(part for _, part in ready)
    if sum(part for _, part in ready) >= _WHOLE:
        return target
    former = normalised((share.node, share.part) for share in routes if share.node in having)
    if former:
        return normalised([*ready, *((share.node, share.part * missing) for share in former)])
    coming = [node for node, copy in copies.items() if copy is Copy.PULLING]
    expected = [(share.node, share.part) for share in target if share.node in coming]
    anywhere = [(node, 1.0) for node in having or coming]
    return normalised(ready or ([] if having else expected) or anywhere) or target
