"""Keep the outputs of the requests that have not ended, and tell telemetry what becomes of them.

It is the same for requests that run here and for those that run on other nodes: token events come in, wherever they
were drawn. Used on one event loop.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

from engine.errors import EngineError, NotAdmitted, NotInTime, StepFailed
from engine.live.adapter_uses import AdapterUses
from engine.metrics.telemetry import Telemetry
from engine.output import RequestOutput
from engine.tenants.accounts import TenantAccounts
from engine.tenants.usage_counts import UsageCounts
from engine.tokenizer import Tokenizer
from scheduler.limits import RequestRefused
from scheduler.plan import FinishReason, SequenceKey, TokenEvent
from scheduler.request import InvalidParameter, Request

_log = logging.getLogger(__name__)


class LiveOutputs:
    """Outputs by request id; a StepListener."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        telemetry: Telemetry,
        finish: Callable[[SequenceKey], None],
        abort: Callable[[str], None],
        accounts: TenantAccounts | None = None,
    ) -> None:
        """Know none. `finish` ends a sequence whose text is complete, `abort` a request that nobody wants any more.

        `accounts` are told when a tenant's request begins and ends.
        """
        self._tokenizer, self._telemetry = tokenizer, telemetry
        self._finish, self._abort = finish, abort
        self.uses, self.accounts = AdapterUses(), accounts or TenantAccounts()
        self.usage = UsageCounts()
        self._outputs: dict[str, RequestOutput] = {}
        self._models: dict[str, str] = {}  # of the same requests, the names that they asked for
        self._counted_as: dict[str, str] = {}  # and those under which metrics count them
        self._ended = asyncio.Event()  # set when the last request has ended

    def __len__(self) -> int:
        return len(self._outputs)

    def open(self, request: Request, model: str, target: str = "") -> RequestOutput:
        """Return the output of a request that was accepted under the name `model`.

        Metrics count it under `target`, the name whose meaning answers it, where that is another.
        """
        output = self._outputs[request.request_id] = RequestOutput(request, self._tokenizer, self._leave)
        self._models[request.request_id] = model
        self._counted_as[request.request_id] = target or model
        self._telemetry.started(target or model)
        self.uses.began(model)
        self.accounts.began(request, model)
        return output

    @contextmanager
    def refusals(self, tenant: str, model: str, is_known: Callable[[], bool]) -> Generator[None]:
        """Count what is raised for a client of a tenant; under the name of `model` only if that is known."""
        with self._telemetry.refusals.counted():
            try:
                yield
            except (EngineError, RequestRefused, InvalidParameter):
                self._refused(tenant, model if is_known() else "")
                raise

    def running(self, request_id: str) -> tuple[int, ...]:
        """List the sequences of a request whose text is not complete; none if it has ended."""
        output = self._outputs.get(request_id)
        return () if output is None else output.running

    def names_by_state(self) -> tuple[set[str], set[str]]:
        """Return the names under which tokens are drawn, and those under which some request has none yet."""
        running, waiting = set[str](), set[str]()
        for request_id, output in self._outputs.items():
            (running if output.output_tokens else waiting).add(self._models[request_id])
        return running, waiting

    def hear(self, events: Sequence[TokenEvent]) -> None:
        """Take in events, in order; those of requests that have ended are passed over."""
        now_s = time.monotonic()
        for event in events:
            output = self._outputs.get(event.key.request_id)
            if output is not None:
                self._try_to_push(output, event, now_s)

    def fail(self, request_id: str, error: EngineError) -> None:
        """End a request's output with an error."""
        was_refused = isinstance(error, NotAdmitted | NotInTime)
        if (output := self._forget(request_id, "error", was_refused)) is not None:
            output.fail(error)

    def abort(self, name: str) -> int:
        """End all requests under a name as aborted, with the tokens that they have; return how many they were."""
        now_s = time.monotonic()
        found = [request_id for request_id, model in self._models.items() if model == name]
        for request_id in found:
            self._abort(request_id)
            output = self._outputs[request_id]
            for index in output.running:
                end = TokenEvent(SequenceKey(request_id, index), None, finish_reason=FinishReason.ABORT)
                self._try_to_push(output, end, now_s)
        return len(found)

    def end_all(self, error: EngineError, reason: str) -> None:
        """Abort what still runs, and end its outputs with an error."""
        for request_id in tuple(self._outputs):
            self._abort(request_id)
            if (output := self._forget(request_id, reason)) is not None:
                output.fail(error)

    async def drain(self, timeout_s: float) -> None:
        """Wait, at most `timeout_s`, for all outputs to end."""
        self._ended.clear()
        if self._outputs:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._ended.wait()
            except TimeoutError:
                _log.warning("%d requests were still running after %g s", len(self._outputs), timeout_s)

    def _leave(self, request_id: str) -> None:
        """End a request whose client has left."""
        self._abort(request_id)
        self._forget(request_id, FinishReason.ABORT.value)

    def _forget(self, request_id: str, reason: str, was_refused: bool = False) -> RequestOutput | None:
        output = self._outputs.pop(request_id, None)
        if output is not None:
            model, prompt_tokens = self._models.pop(request_id), len(output.request.prompt_token_ids)
            self.uses.ended(model)
            self.accounts.ended(request_id, prompt_tokens + output.output_tokens, was_refused)
            self._telemetry.finished(
                self._counted_as.pop(request_id), reason, prompt_tokens, output.output_tokens
            )
            self._count(output, model, reason, was_refused)
        if not self._outputs:
            self._ended.set()
        return output

    def _count(self, output: RequestOutput, model: str, reason: str, was_refused: bool) -> None:
        """Count for its tenant what a request has used."""
        tenant, prompt_tokens = output.request.tenant, len(output.request.prompt_token_ids)
        if was_refused:
            self._refused(tenant, model)
            return
        self._telemetry.tenants.finished(tenant, reason, prompt_tokens, output.output_tokens)
        self.usage.ended(tenant, model, prompt_tokens, output.cached_tokens, output.output_tokens)

    def _refused(self, tenant: str, model: str) -> None:
        self._telemetry.tenants.finished(tenant, "refused", 0, 0)
        self.usage.refused(tenant, model)

    def _try_to_push(self, output: RequestOutput, event: TokenEvent, now_s: float) -> None:
        """Give an event to its output; what cannot be turned into text ends its own request."""
        try:
            self._push(output, event, now_s)
        except Exception:  # noqa: BLE001 - as of a step: it ends its own request
            request_id = event.key.request_id
            _log.exception("the tokens of %s could not be turned into text", request_id)
            self._abort(request_id)
            self._forget(request_id, "error")
            output.fail(StepFailed("the output could not become text; the server's log has the cause"))

    def _push(self, output: RequestOutput, event: TokenEvent, now_s: float) -> None:
        delta = output.push(event, now_s)
        if delta is None:
            return
        if delta.token_ids:
            counted_as, times_s = self._counted_as[event.key.request_id], output.token_times_s[delta.index]
            if len(times_s) > 1:
                self._telemetry.next_token(counted_as, times_s[-1] - times_s[-2])
            else:
                self._telemetry.first_token(counted_as, times_s[0])
        if delta.finish_reason is None:
            return
        if event.finish_reason is None:
            self._finish(event.key)
        if not output.is_open:
            self._forget(event.key.request_id, delta.finish_reason.value)
