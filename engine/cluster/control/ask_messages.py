"""Define what members and the coordinator ask of each other, and the answers.

Errors travel by kind, so that whoever asked raises the one that was raised elsewhere.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec

from engine.catalogue.alias_targets import Targets
from engine.catalogue.base import MOST_HELD_S
from engine.cluster.control.control_values import (
    MOST_TEXT_CHARS,
    AdapterName,
    ControlMessage,
    Copies,
    FolderText,
    OptionalName,
    Text,
    WireEntry,
)
from engine.errors import (
    AdapterAbsent,
    AdapterExists,
    AdapterFailed,
    EngineError,
    InvalidAdapter,
    InvalidAdapterName,
    NotInTime,
    UnknownModel,
)
from transport.base import Count

MOST_RECORDS = 1000
"""Of one answer."""
MOST_STATUS_BYTES = 6 << 20
Fault = Literal["name", "exists", "absent", "invalid", "failed", "later", "unknown"]
"""Why an ask failed: an InvalidAdapterName, AdapterExists, AdapterAbsent, InvalidAdapter, AdapterFailed, NotInTime,
UnknownModel."""
RouterAct = Literal["register", "remove", "alias", "set", "hold", "abort"]
MemberAct = Literal["resolve", "load", "unload", "hold", "abort"]
RETRY_AFTER_S = 2
_ERRORS: Mapping[Fault, type[EngineError]] = {
    "name": InvalidAdapterName,
    "exists": AdapterExists,
    "absent": AdapterAbsent,  # before InvalidAdapter, of which it is a kind
    "invalid": InvalidAdapter,
    "failed": AdapterFailed,
    "later": NotInTime,
    "unknown": UnknownModel,
}


class Ask(ControlMessage, frozen=True):
    """Do something for the sender, and answer by the same `number`.

    A router asks to `register` a folder, to `remove` a name, or to `set` what is asked for one; or it asks to let one
    be an `alias` of the name that `folder` gives, perhaps with `targets` by share. The coordinator asks a node to
    `resolve` a name that it declares, to `load` a folder, or to `unload` a name. A router asks to `hold` a name for so
    many `seconds`, 0 to release it, or to `abort` its requests. The coordinator asks the same of every router.
    """

    number: Count
    act: RouterAct | MemberAct
    name: AdapterName
    folder: FolderText = ""
    replaces: bool = True
    pinned: Copies | None = None
    max_requests: Count | None = None
    targets: Targets = ()
    seconds: Annotated[float, msgspec.Meta(ge=0, le=MOST_HELD_S)] = 0.0


class Answer(ControlMessage, frozen=True):
    """What came of an Ask: nothing, an entry or how many requests were `aborted`, or why it failed."""

    number: Count
    entry: WireEntry | None = None
    fault: Fault | None = None
    reason: Text = ""
    aborted: Count = 0

    @classmethod
    def failed(cls, number: int, error: EngineError) -> "Answer":
        """Tell by which error an ask failed; one that is not among the faults may pass."""
        match error:
            case InvalidAdapterName():
                reason = error.reason
            case UnknownModel():
                reason = error.name  # which may be another than that of the ask
            case _:
                reason = str(error)
        return cls(number, None, _fault(error), reason[:MOST_TEXT_CHARS])

    def check(self, name: str) -> None:
        """Raise the error by which an ask about `name` failed, if it did."""
        match self.fault:
            case None:
                return
            case "name":
                raise InvalidAdapterName(name, self.reason)
            case "exists":
                raise AdapterExists(name)
            case "unknown":
                raise UnknownModel(self.reason or name)
            case "later":
                raise NotInTime(self.reason, RETRY_AFTER_S)
            case "absent":
                raise AdapterAbsent(self.reason)
            case "invalid":
                raise InvalidAdapter(self.reason)
            case "failed":
                raise AdapterFailed(self.reason)


class StatusAsk(ControlMessage, frozen=True):
    """A router asks for the `cluster`, for `limit` `adapters` after the name `after`, or for that `adapter` alone."""

    number: Count
    what: Literal["cluster", "adapters", "adapter"]
    after: OptionalName = ""
    limit: Annotated[int, msgspec.Meta(ge=0, le=MOST_RECORDS)] = 0


class StatusTold(ControlMessage, frozen=True):
    """The answer: a ClusterRecord or a list of AdapterRecords, as MessagePack."""

    number: Count
    content: Annotated[bytes, msgspec.Meta(max_length=MOST_STATUS_BYTES)]


def _fault(error: EngineError) -> Fault:
    for fault, kind in _ERRORS.items():
        if isinstance(error, kind):
            return fault
    return "failed"
