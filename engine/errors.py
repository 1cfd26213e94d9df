"""Name what can go wrong between a client and its answer; HTTP and batches map each to their own status codes."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from lora.errors import (
    AdapterRefused,
    AdapterUnreachable,
    InvalidName,
    NameTaken,
    SourceAbsent,
    UnknownAdapter,
)
from lora.format.adapter_files import short


class EngineError(Exception):
    """Base of the errors that a client is told about; the message names what, which value, and the remedy."""


class UnknownModel(EngineError):
    """The request names neither the base model nor an adapter."""

    def __init__(self, name: str) -> None:
        super().__init__(f"model {short(name)} is neither the base model nor a known adapter: see /v1/models")
        self.name = name


class Overloaded(EngineError):
    """Too many requests wait already; trying again in `retry_after_s` is sensible."""

    def __init__(self, waiting: int, limit: int, retry_after_s: int) -> None:
        super().__init__(f"{waiting} requests wait already (limit {limit}): retry in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class AdapterBusy(EngineError):
    """As many requests as may be are under way by an adapter's name; trying again in `retry_after_s` is sensible."""

    def __init__(self, name: str, most: int) -> None:
        super().__init__(f"{most} requests are under way for {short(name)}, as many as may be: retry in 1 s")
        self.retry_after_s = 1


class AdapterHeld(EngineError):
    """An adapter's name takes no requests for now; trying again in `retry_after_s` is sensible."""

    def __init__(self, name: str, retry_after_s: int) -> None:
        super().__init__(f"{short(name)} is held by an administrator: retry in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class RateLimited(EngineError):
    """A tenant has used what it may for now; trying again in `retry_after_s` is sensible."""

    def __init__(self, what: str, limit: int, retry_after_s: int) -> None:
        super().__init__(f"this key has used its {limit} {what}: retry in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class BeyondLimit(EngineError):
    """A tenant asks for more at once than it ever may; sending it again would not help."""

    def __init__(self, asked: int, what: str, limit: int) -> None:
        super().__init__(
            f"the request asks for {asked}, and this key may have {limit} {what}: send fewer or shorter prompts at "
            "once, or lower max_tokens or n"
        )


class TooManySequences(EngineError):
    """A request for more sequences than may ever wait; sending it again would not help."""

    def __init__(self, count: int, limit: int) -> None:
        super().__init__(
            f"the request asks for {count} sequences, prompts times n, and at most {limit} may wait (--max-waiting):"
            " send fewer prompts at once, or lower n"
        )


class Draining(EngineError):
    """The node is shutting down: it finishes what it has and takes nothing new."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down: send the request to another node")


class InvalidAdapterName(EngineError):
    """An adapter cannot be registered under this name."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"lora_name={short(name)} is not accepted: {reason}")
        self.name, self.reason = name, reason


class AdapterExists(EngineError):
    """An adapter of this name is there already, and the client did not want it replaced."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name!r} is loaded already: unload it, or give load_inplace=true")


class AskRouter(EngineError):
    """A node of a cluster was asked to change what the coordinator owns."""

    def __init__(self) -> None:
        super().__init__(
            "this server is a node of a cluster, whose registry is the coordinator's: ask a router"
        )


class InvalidAdapter(EngineError):
    """The adapter's files cannot be served as they are; the request fails until they are changed."""


class AdapterAbsent(InvalidAdapter):
    """There is no adapter where its source says."""


class AdapterFailed(EngineError):
    """The adapter could not be read, or not made resident, for a reason that may pass."""


class PeersSilent(EngineError):
    """The adapter may be a peer's, but not every peer could be asked: trying again later is sensible."""


class NotInTime(EngineError):
    """Something that passes kept the server from answering in time: a busy pool, or files that do not answer."""

    def __init__(self, reason: str, retry_after_s: int) -> None:
        super().__init__(f"{reason}: retry in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class NotFetched(NotInTime):
    """A model whose files are to be fetched before more can be told of it: whoever asks awaits that, and asks again."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{short(name)} is still to be fetched from its source", 2)
        self.name = name


class NotAdmitted(EngineError):
    """No node would answer in the time that a first token may take: trying again later is sensible."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"no node would answer in time: retry in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class StepFailed(EngineError):
    """A step of the engine raised; the requests at fault, or all in it, were ended and the engine goes on.

    `is_own` says that the request itself was found at fault.
    """

    def __init__(self, message: str, is_own: bool = False) -> None:
        super().__init__(message)
        self.is_own = is_own


class StructureFailed(EngineError):
    """A text that can take the form no more that was asked for: a step could not work it out, or no token goes on."""

    def __init__(self) -> None:
        super().__init__(
            "structured_outputs: the form leaves no token to go on with, or is too costly to follow: give a simpler one"
        )


class EngineStopped(EngineError):
    """The step loop has ended by an error of its own: nothing runs any more, and the process should start afresh."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(
            f"the engine has stopped ({type(cause).__name__}; the log has the cause): it must be started again"
        )


class InvalidConfig(EngineError):
    """An option's value that is not accepted: `field` names the option, the message the value and the remedy."""

    def __init__(self, field: str, value: object, remedy: str) -> None:
        super().__init__(f"{field}={value!r} is not accepted: {remedy}")
        self.field = field


class UnknownOption(InvalidConfig, TypeError):
    """A keyword that names no option; a TypeError as well, as of any call with an argument that is not there."""


class OutputFailed(EngineError):
    """A file of results cannot be written any more; what it holds is whole."""

    def __init__(self, path: Path, cause: OSError) -> None:
        super().__init__(
            f"output={str(path)!r} cannot be written ({cause.strerror}): mend that, and run the same command again "
            "to go on"
        )


class WorkersFailed(EngineError):
    """One of the processes of a tensor-parallel model has ended or failed, and with it the engine."""

    def __init__(self, rank: int, size: int, reason: str) -> None:
        super().__init__(
            f"process {rank} of the {size} that compute together failed ({reason}): mend the cause and start again"
        )
        self.rank, self.reason = rank, reason


@contextmanager
def adapter_errors(name: str) -> Generator[None]:
    """Raise what the adapters' store refuses `name` with as the error that a client is told."""
    try:
        yield
    except UnknownAdapter:
        raise UnknownModel(name) from None
    except AdapterUnreachable as error:
        raise PeersSilent(str(error)) from error
    except InvalidName as error:
        raise InvalidAdapterName(name, error.reason) from error
    except NameTaken as error:
        raise AdapterExists(name) from error
    except SourceAbsent as error:
        raise AdapterAbsent(str(error)) from error
    except AdapterRefused as error:
        raise (AdapterFailed if error.may_pass else InvalidAdapter)(str(error)) from error
