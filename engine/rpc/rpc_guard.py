"""Surround every gRPC handler: keys, log lines, and one table from HTTP's statuses to gRPC's codes."""

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any
from urllib.parse import unquote

import grpc

from engine.api.errors import FORESEEN, ApiError, as_api_error
from engine.api.keys import AccessRules, Permission, is_local
from engine.metrics.request_log import RequestLog, RequestRecord
from engine.rpc.translation import field_name

CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
}
_log = logging.getLogger(__name__)

Context = Any  # grpc.aio's context is generic only to type checkers
Answers = Callable[[Any, RequestRecord], AsyncIterator[Any]]
Answer = Callable[[Any, RequestRecord], Awaitable[Any]]


def code_of(error: ApiError) -> grpc.StatusCode:
    """Return the code that says what HTTP's status would."""
    if error.code == "adapter_exists":
        return grpc.StatusCode.ALREADY_EXISTS
    return CODES.get(error.status, grpc.StatusCode.UNKNOWN)


class RpcGuard:
    """What surrounds every handler: the keys, a record for the logs, and codes for whatever goes wrong."""

    def __init__(self, rules: AccessRules, log: RequestLog) -> None:
        """Let in whom `rules` let in, and tell `log` of every call when it has ended."""
        self._rules, self._log = rules, log

    def unary(
        self, path: str, needed: Permission, answer: Answer
    ) -> Callable[[Any, Context], Awaitable[Any]]:
        """Return a handler of one answer."""

        async def handle(message: Any, context: Context) -> Any:
            async def once(message: Any, record: RequestRecord) -> AsyncIterator[Any]:
                yield await answer(message, record)

            found = [each async for each in self._guarded(path, needed, once, message, context)]
            return found[0]

        return handle

    def stream(
        self, path: str, needed: Permission, answers: Answers
    ) -> Callable[[Any, Context], AsyncIterator[Any]]:
        """Return a handler of a stream of answers."""

        async def handle(message: Any, context: Context) -> AsyncIterator[Any]:
            async with aclosing(self._guarded(path, needed, answers, message, context)) as guarded:
                async for each in guarded:
                    yield each

        return handle

    async def _guarded(
        self, path: str, needed: Permission, answers: Answers, message: Any, context: Context
    ) -> AsyncGenerator[Any, None]:
        metadata = {str(key).lower(): value for key, value in context.invocation_metadata() or ()}
        host = _host(context.peer())
        record = RequestRecord(uuid.uuid4().hex, host, "gRPC", path)
        record.administers = needed is Permission.ADMINISTER
        failure: ApiError | None = None
        try:
            try:
                local = is_local(host, metadata)
                record.key = self._rules.admit(needed, metadata.get("authorization"), local)
                if record.administers:
                    await self._log.wait_for_audit()
                async for each in answers(message, record):
                    yield each
                record.status = 200
            except FORESEEN as error:
                failure = _noted(error, record)
            except Exception as error:  # noqa: BLE001 - the server's boundary: logged, and answered
                _log.exception("gRPC %s failed in a way that nobody foresaw", path)
                failure = _noted(error, record)
            finally:
                await self._log.write_audit(record)
        except (asyncio.CancelledError, GeneratorExit):
            record.client_gone = True
            raise
        finally:
            self._log.write_access(record)
        if failure is not None:  # only now: a client hears of nothing before the audit has it
            await context.abort(code_of(failure), _in_wire_words(failure))


def _noted(error: Exception, record: RequestRecord) -> ApiError:
    """Express a failure as HTTP would, for the logs too."""
    failure = as_api_error(error)
    record.status, record.code = failure.status, failure.code
    return failure


def _in_wire_words(error: ApiError) -> str:
    """Return the message with the field's name as the protocol has it."""
    name = error.param or ""
    if name and error.message.startswith(f"{name}:"):
        return field_name(name) + error.message.removeprefix(name)
    return error.message


def _host(peer: str) -> str:
    """Return the host of gRPC's `ipv4:HOST:PORT` or `ipv6:[HOST]:PORT`."""
    return unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]")
