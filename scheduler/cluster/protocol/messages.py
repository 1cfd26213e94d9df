"""What crosses between nodes and the coordinator: events in, commands out. Frozen values; what
carries them is elsewhere.

Messages may be lost, doubled, delayed and reordered. Reports therefore say everything anew each time, totals
are cumulative, and commands that change a node are numbered (see `delivery`).
"""

from dataclasses import dataclass

from lora.adapter import AdapterRef
from scheduler.cluster.state import OperatingPoints, RoutingTable


@dataclass(frozen=True, slots=True)
class NodeHardware:
    """What a node is, as far as placing adapters goes."""

    memory_bytes: int
    operating_points: OperatingPoints
    zone: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """A node's account of itself. A node joins by report 1 of a session.

    `session` grows whenever the node starts anew or is told to rejoin; `number` counts the session's reports
    from 1. `applied` is the last command of the session that the node has obeyed. `held` are the adapters
    that it keeps for the coordinator, or is draining before it frees them; `loading` those on their way;
    `cached` those it has beyond that and may free at any time. Their bytes come out of
    `machine.memory_bytes`, but cached ones give way. `taken` are the input and output tokens, since the
    session began, of the work that the node took in, by adapter; adapters whose total did not change since
    the report before may be left out. `slowdown` is seconds per step over what the profile predicts.
    `table_version` is that of the routing table it routes by, 0 for none.
    """

    node: str
    session: int
    number: int
    machine: NodeHardware
    applied: int = 0
    table_version: int = 0
    held: tuple[AdapterRef, ...] = ()
    loading: tuple[AdapterRef, ...] = ()
    cached: tuple[AdapterRef, ...] = ()
    taken: tuple[tuple[AdapterRef, int], ...] = ()
    slowdown: float = 1.0


@dataclass(frozen=True, slots=True)
class RouterReport:
    """A router says that it is there, and by which routing table it routes; wanted about once a second.

    `refused` are the prompt tokens, since the router's `session` began, of the requests that it refused, by
    adapter. They are demand too: else an adapter that has no place would never be seen to need one.
    """

    router: str
    table_version: int
    session: int = 0
    refused: tuple[tuple[AdapterRef, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Leave:
    """A node asks to go: it serves on until `AllowLeave`."""

    node: str
    session: int


@dataclass(frozen=True, slots=True)
class Crash:
    """A node's connection broke, or its process was seen dead."""

    node: str
    session: int


@dataclass(frozen=True, slots=True)
class AdapterAdded:
    """The registry gained an adapter (or says again that it has it)."""

    adapter: AdapterRef


@dataclass(frozen=True, slots=True)
class AdapterDeleted:
    """The registry lost an adapter: no node should serve or hold it."""

    adapter: AdapterRef


@dataclass(frozen=True, slots=True)
class AdapterPinned:
    """A registered adapter is to have at least so many copies from now on, 0 meaning as many as is thought best."""

    adapter: AdapterRef
    copies: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; wanted about once a second."""


Event = Report | RouterReport | Leave | Crash | AdapterAdded | AdapterDeleted | AdapterPinned | Tick


@dataclass(frozen=True, slots=True)
class Pull:
    """Fetch `adapter` from one of `sources` (the best first), or from the registry where there is none or
    none has it. A node that has it already, or is draining it, does not fetch it again.

    The node keeps it until `Drop`, or until a request that waits for another adapter needs its pages; then
    the node fetches it anew by itself as soon as there is room.
    """

    node: str
    session: int
    number: int
    adapter: AdapterRef
    sources: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Drop:
    """Stop loading `adapter`, or free it (at most keep it as cached) once the requests that run on it have
    ended."""

    node: str
    session: int
    number: int
    adapter: AdapterRef


@dataclass(frozen=True, slots=True)
class AllowLeave:
    """The node that asked to leave may go: nothing is routed to it and nothing is lost with it."""

    node: str
    session: int
    number: int


@dataclass(frozen=True, slots=True)
class Publish:
    """Send `table` to `nodes` and `routers`; each keeps the highest version that it has seen."""

    nodes: tuple[str, ...]
    table: RoutingTable
    routers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rejoin:
    """The node's session is over (it was taken for dead, or began under another coordinator): it must report
    under `next_session`. Of no account to a node that is not in `session` any more."""

    node: str
    session: int
    next_session: int


Numbered = Pull | Drop | AllowLeave
Command = Numbered | Publish | Rejoin
