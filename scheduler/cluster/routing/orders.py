"""What goes into a router's decisions and what comes out: offers of requests, and orders to send or refuse them."""

from dataclasses import dataclass
from enum import Enum

from lora.adapter import AdapterRef


@dataclass(frozen=True, slots=True)
class Offer:
    """A request as a router sees it. `chunks` are of its prompt (see `prefix_chunks`); lower `priority` first."""

    request_id: str
    adapter: AdapterRef
    prompt_tokens: int
    tenant: str = ""
    priority: int = 0
    chunks: tuple[int, ...] = ()


class RefusalReason(Enum):
    """Why a request is not served: no node in time; none reachable; or it was sent too often."""

    OVERLOADED = "overloaded"
    NO_NODE = "no node"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Send:
    """Send the request to `node` as that `attempt`; it is the `number`-th that this router sends there."""

    request_id: str
    attempt: int
    node: str
    number: int


@dataclass(frozen=True, slots=True)
class Refuse:
    """Tell the client that its request ends here; it may come again after `retry_after_s`."""

    request_id: str
    reason: RefusalReason
    retry_after_s: float


Order = Send | Refuse
