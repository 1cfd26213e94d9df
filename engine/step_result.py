"""Hold what comes of a step, and tell apart what the engine asked of itself from what clients asked."""

from concurrent.futures import Future
from dataclasses import dataclass

from engine.errors import EngineError
from scheduler.plan import TokenEvent


@dataclass(frozen=True, slots=True)
class Failure:
    """A live request that the engine gave up on, and why; nothing more will come of it."""

    request_id: str
    error: EngineError


@dataclass(frozen=True, slots=True)
class StepResult:
    """What came of a step. `idle` is true when nothing could run: wait for a submission or an adapter."""

    events: tuple[TokenEvent, ...]
    failures: tuple[Failure, ...]
    idle: bool


NOTHING = StepResult((), (), idle=True)


class Probes:
    """The engine's own requests, of one token each: what comes of one goes to its future, and to no StepResult.

    All but `open` are called under the core's lock.
    """

    def __init__(self) -> None:
        self._outcomes: dict[str, Future[TokenEvent]] = {}  # by request id

    def open(self, request_id: str) -> Future[TokenEvent]:
        """Return the future of a request that is about to be queued."""
        outcome = self._outcomes[request_id] = Future[TokenEvent]()
        return outcome

    def close(self, request_id: str) -> None:
        """Expect nothing more of a request; unknown ids are fine."""
        self._outcomes.pop(request_id, None)

    def take_events(self, events: tuple[TokenEvent, ...]) -> tuple[TokenEvent, ...]:
        """Settle the probes that have an event, and return the other events."""
        if not self._outcomes:
            return events
        rest: list[TokenEvent] = []
        for event in events:
            outcome = self._outcomes.pop(event.key.request_id, None)
            if outcome is None:
                rest.append(event)
            else:
                outcome.set_result(event)
        return tuple(rest)

    def take_failures(self, failures: tuple[Failure, ...]) -> tuple[Failure, ...]:
        """Settle the probes that failed, and return the other failures."""
        rest: list[Failure] = []
        for failure in failures:
            outcome = self._outcomes.pop(failure.request_id, None)
            if outcome is None:
                rest.append(failure)
            else:
                outcome.set_exception(failure.error)
        return tuple(rest)
