"""Surround every gRPC handler: keys, log lines, and one table from HTTP's statuses to gRPC's codes."""

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import unquote

import grpc
from google.protobuf.message import Message

from engine.api.errors import FORESEEN, ApiError, as_api_error
from engine.api.keys import AccessRules, Permission, is_local
from engine.api.schema import is_request_id
from engine.metrics.request_log import RequestLog, RequestRecord
from engine.rpc.bounded_server import RpcService
from engine.rpc.declared_fields import read_message
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
REQUEST_ID, RETRY_AFTER = "x-request-id", "retry-after"
_MOST_CHARS = 500  # of an error: it goes as metadata, which is bounded
_TAKEN = frozenset({"adapter_exists", "request_exists"})
_log, _grpc = logging.getLogger(__name__), cast(Any, grpc)

Context = Any  # grpc.aio's context is generic only to type checkers


class RpcCall:
    """One call, as its handler sees it: what the logs will say of it, and what it came with."""

    def __init__(self, context: Context, record: RequestRecord, metadata: dict[str, str]) -> None:
        """Tell the client nothing yet."""
        self.record, self.metadata = record, metadata
        self._context, self._has_begun = context, False

    async def begin(self) -> None:
        """Tell the client the call's id, before any answer; once."""
        if not self._has_begun:
            self._has_begun = True
            await self._context.send_initial_metadata(((REQUEST_ID, self.record.request_id),))


Answers = Callable[[Any, RpcCall], AsyncGenerator[Message, None]]
Answer = Callable[[Any, RpcCall], Awaitable[Message]]


@dataclass(frozen=True, slots=True)
class RpcMethod:
    """One call of a service: what its client must be allowed, what it sends, and what answers it.

    `fields` has what the message calls HTTP's fields, where that is not what the protocol does.
    """

    name: str
    needed: Permission
    request: type[Message]
    answers: Answers
    streams: bool = True
    fields: Mapping[str, str] = field(default_factory=dict[str, str])


def one_answer(
    name: str,
    needed: Permission,
    request: type[Message],
    answer: Answer,
    fields: Mapping[str, str] | None = None,
) -> RpcMethod:
    """Make a method that answers with one message."""

    async def once(message: Any, call: RpcCall) -> AsyncGenerator[Message, None]:
        yield await answer(message, call)

    return RpcMethod(name, needed, request, once, False, fields or {})


def code_of(error: ApiError) -> grpc.StatusCode:
    """Return the code that says what HTTP's status would."""
    if error.code in _TAKEN:
        return grpc.StatusCode.ALREADY_EXISTS
    return CODES.get(error.status, grpc.StatusCode.UNKNOWN)


class RpcGuard:
    """What surrounds every handler: the keys, a record for the logs, and codes for whatever goes wrong.

    It reads the messages itself, so that one that is none is refused as any bad value is, and after the keys.
    """

    def __init__(self, rules: AccessRules, log: RequestLog, write_timeout_s: float) -> None:
        """Let in whom `rules` let in, and tell `log` of every call when it has ended.

        A client that takes nothing of a stream for `write_timeout_s` is given up.
        """
        self._rules, self._log, self._write_timeout_s = rules, log, write_timeout_s

    def service(self, name: str, methods: Sequence[RpcMethod]) -> RpcService:
        """Make a service of its methods."""
        handlers = {method.name: self._handler(f"/{name}/{method.name}", method) for method in methods}
        return RpcService(name, handlers)

    def _handler(self, path: str, method: RpcMethod) -> Any:
        async def stream(sent: bytes, context: Context) -> None:
            try:
                async with aclosing(self._guarded(path, method, sent, context)) as guarded:
                    async for each in guarded:
                        async with asyncio.timeout(self._write_timeout_s):
                            await context.write(each)
            except TimeoutError:
                await context.abort(
                    grpc.StatusCode.ABORTED, f"nothing was read for {self._write_timeout_s:g} s"
                )

        async def unary(sent: bytes, context: Context) -> Message:
            (answer,) = [each async for each in self._guarded(path, method, sent, context)]
            return answer

        if method.streams:
            return _grpc.unary_stream_rpc_method_handler(stream, response_serializer=_serialized)
        return _grpc.unary_unary_rpc_method_handler(unary, response_serializer=_serialized)

    async def _guarded(
        self, path: str, method: RpcMethod, sent: bytes, context: Context
    ) -> AsyncGenerator[Message, None]:
        metadata = {str(key).lower(): value for key, value in context.invocation_metadata() or ()}
        host, given = _host(context.peer()), metadata.get(REQUEST_ID, "")
        record = RequestRecord(given if is_request_id(given) else uuid.uuid4().hex, host, "gRPC", path)
        record.administers = method.needed is Permission.ADMINISTER
        call = RpcCall(context, record, metadata)
        if method.needed in (Permission.ASK, Permission.ADMINISTER):
            self._log.begin(record, metadata)
        failure: ApiError | None = None
        try:
            try:
                local = is_local(host, metadata)
                bearer = self._rules.admit(method.needed, metadata.get("authorization"), local)
                record.key, record.tenant, record.sees_all = bearer.key, bearer.tenant, bearer.sees_all
                if record.administers:
                    await self._log.wait_for_audit()
                message = read_message(method.request, sent)
                async with aclosing(method.answers(message, call)) as answers:
                    async for each in answers:
                        await call.begin()
                        yield each
                record.status = 200
                context.set_trailing_metadata(tuple(record.rates().items()))
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
            await _refuse(context, failure, record, method.fields)


async def _refuse(
    context: Context, failure: ApiError, record: RequestRecord, fields: Mapping[str, str]
) -> None:
    """End a call with a code, the words of the protocol, and what HTTP tells by headers."""
    told = [(REQUEST_ID, record.request_id)]
    if failure.retry_after_s:
        told.append((RETRY_AFTER, str(failure.retry_after_s)))
    told += record.rates().items()
    await context.abort(code_of(failure), _in_wire_words(failure, fields), tuple(told))


def _serialized(message: Message) -> bytes:
    return message.SerializeToString()


def _noted(error: Exception, record: RequestRecord) -> ApiError:
    """Express a failure as HTTP would, for the logs too."""
    failure = as_api_error(error)
    record.status, record.code = failure.status, failure.code
    return failure


def _in_wire_words(error: ApiError, fields: Mapping[str, str]) -> str:
    """Return the message with the field's name as the protocol has it, as far as metadata may hold it."""
    name, message = error.param or "", error.message.encode(errors="backslashreplace").decode()
    if name and message.startswith((f"{name}:", f"{name}=")):
        message = fields.get(name, field_name(name)) + message.removeprefix(name)
    return message if len(message) <= _MOST_CHARS else message[: _MOST_CHARS - 1] + "…"


def _host(peer: str) -> str:
    """Return the host of gRPC's `ipv4:HOST:PORT` or `ipv6:[HOST]:PORT`."""
    return unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]")
