"""Run the coordinator: members' streams become events, commands go out on streams, and all are told the view.

It stands beside the data path: while it is away, members keep what they know. What it decides with is pure and soft.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import grpc

from engine.api.server.rate_limited_log import RateLimitedLog
from engine.catalogue.catalogue_file import CatalogueFile, Superseded
from engine.cluster.control.ask_messages import RETRY_AFTER_S, Answer, Ask, StatusAsk
from engine.cluster.control.broadcast import Broadcast
from engine.cluster.control.cluster_status import CoordinatorStatus
from engine.cluster.control.control_messages import (
    VERSION,
    CoordinatorHello,
    Declares,
    DropOrder,
    FromMember,
    LeaveAsk,
    LeaveOrder,
    MemberHello,
    PullOrder,
    RejoinOrder,
    ReportChange,
    RouterReportChange,
    TurnedAway,
    encoded,
    read_from_member,
)
from engine.cluster.control.control_values import ControlFault, WireAdapter
from engine.cluster.control.declared_names import DeclaredNames
from engine.cluster.control.member_stream import MemberStream
from engine.cluster.control.registrations import Registrations
from engine.cluster.control.shared_catalogue import SharedCatalogue
from engine.errors import EngineError, NotInTime
from engine.rpc.bounded_server import RpcService
from scheduler.cluster.coordinator.coordinator import Coordinator
from scheduler.cluster.protocol.messages import (
    AllowLeave,
    Command,
    Crash,
    Drop,
    Event,
    Leave,
    Publish,
    Pull,
    Rejoin,
    Report,
    Tick,
)

SERVICE, METHOD = "loraserve.Control", "Join"
MOST_MEMBERS = 2048
_HELLO_S = 30.0  # many members may join at once
_TICK_S = 1.0
_CHECK_LEAD_TICKS = 5
_MOST_OWN_ASKS = 32  # of one member at once
_log = logging.getLogger(__name__)
Context = Any  # grpc.aio's context of bytes in and out is generic only to type checkers


class CoordinatorServer:
    """Whoever leads the cluster. Used on one event loop; `service` is what a gRPC server is to serve."""

    def __init__(self, make: Callable[[int], Coordinator], file: CatalogueFile, profile: str = "") -> None:
        """Lead by what `make` makes of an epoch, with the catalogue of `file`; `profile` is a digest."""
        self.coordinator = make(file.epoch)
        self.streams: dict[str, MemberStream] = {}
        self.catalogue = SharedCatalogue(file, self._tell)
        self.declared = DeclaredNames(self.catalogue)
        self.registrations = Registrations(self.catalogue, self.declared, self.streams)
        self.status = CoordinatorStatus(self.streams, self.catalogue, self.coordinator)
        self.failure: EngineError | None = None  # why it leads no more, if not because it was closed
        self._on_failure: Callable[[], object] = lambda: None
        self._broadcast = Broadcast(self.streams, self.catalogue, self.coordinator, self.declared)
        self._garbage = RateLimitedLog(_log, logging.WARNING)
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed, self._profile = False, profile

    def service(self) -> RpcService:
        """Return what a gRPC server is to serve; messages are bytes to it."""
        return RpcService(SERVICE, {METHOD: cast(Any, grpc).stream_stream_rpc_method_handler(self._join)})

    def on_failure(self, callback: Callable[[], object]) -> None:
        """Call `callback`, on the event loop, when another coordinator has taken the lead."""
        self._on_failure = callback

    async def start(self) -> None:
        """Read the catalogue, and begin to lead. Raises InvalidConfig."""
        await self.catalogue.open()
        self._start(self._tick())

    async def close(self) -> None:
        """Lead no more: streams end, and members keep what they know."""
        self._closed = True
        for stream in tuple(self.streams.values()):
            stream.end("the coordinator ends")
        self._broadcast.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.declared.close()
        await self.catalogue.close()

    async def _tick(self) -> None:
        ticks = 0
        while True:
            await asyncio.sleep(_TICK_S)
            ticks += 1
            self._tell(Tick())
            self._broadcast.plan()
            try:
                if ticks % _CHECK_LEAD_TICKS == 0:
                    await self.catalogue.check_leads()
            except NotInTime as error:
                _log.warning("%s", error)
            except Superseded as error:
                self._resign(error)
                return

    def _resign(self, error: Superseded) -> None:
        self.failure, self._closed = error, True
        _log.error("%s", error)
        for stream in tuple(self.streams.values()):
            stream.end("another coordinator leads")
        self._on_failure()

    def _tell(self, event: Event) -> None:
        """Hand an event to the decisions, and send what they command."""
        for command in self.coordinator.on_event(event, time.monotonic()):
            self._send(command)
        self._broadcast.plan()

    def _send(self, command: Command) -> None:
        if isinstance(command, Publish):
            return  # every stream is told each table once and in order: see Broadcast
        stream = self.streams.get(command.node)
        if stream is None or not stream.is_node:
            return  # it begins anew, and is told then
        match command:
            case Pull(session=session, number=number, adapter=adapter, sources=sources):
                stream.send(PullOrder(session, number, WireAdapter.of(adapter), sources))
            case Drop(session=session, number=number, adapter=adapter):
                stream.send(DropOrder(session, number, WireAdapter.of(adapter)))
            case AllowLeave(session=session, number=number):
                stream.send(LeaveOrder(session, number))
            case Rejoin(session=session, next_session=following):
                stream.send(RejoinOrder(session, following))

    async def _join(self, _requests: object, context: Context) -> None:
        """Serve one stream from its hello to its end."""
        try:
            async with asyncio.timeout(_HELLO_S):
                hello = await context.read()
            message = read_from_member(hello) if isinstance(hello, bytes) else None
        except TimeoutError:
            return
        except ControlFault as fault:
            self._garbage.line(f"{context.peer()}: {fault}")
            return
        if not isinstance(message, MemberHello):
            self._garbage.line(f"{context.peer()}: its first message is no hello")
            return
        if (refusal := self._refusal(message)) is not None:
            self._garbage.line(f"{message.kind} {message.name} is turned away: {refusal}")
            await context.write(encoded(TurnedAway(refusal)))
            return
        await self._converse(self._welcome(message), context)

    def _refusal(self, hello: MemberHello) -> str | None:
        """Say why a member is not taken, if so."""
        present = self.streams.get(hello.name)
        nodes = [each.hello for each in self.streams.values() if each.is_node]
        if self._closed:
            return "this coordinator ends: try again"
        if hello.version != VERSION:
            return f"version {hello.version} meets {VERSION} at the coordinator: update the older one"
        if hello.epoch > self.catalogue.epoch:
            return f"a coordinator of epoch {hello.epoch} leads, and this one is of {self.catalogue.epoch}"
        if present is None and len(self.streams) >= MOST_MEMBERS:
            return f"{MOST_MEMBERS} members are there already"
        if present is not None and present.hello.start > hello.start:
            return f"another member is called {hello.name} and began later: give --node-name"
        if hello.profile != self._profile:
            return "it tells costs by another profile than the coordinator: give all the same --profile"
        others = [each for each in nodes if each.name != hello.name and each.weights != hello.weights]
        if hello.kind == "node" and others:
            return f"its base model is another than that of node {others[0].name}: serve the same weights"
        return None

    def _welcome(self, hello: MemberHello) -> MemberStream:
        """Begin a member's stream, which takes the place of one of the same name."""
        before = self.streams.pop(hello.name, None)
        if before is not None:
            before.end("it has connected anew")
            if before.is_node:
                self.declared.leave(before)
                if before.hello.start != hello.start:
                    self._tell(Crash(hello.name, before.session))
        stream = self.streams[hello.name] = MemberStream(hello)
        if stream.is_node:
            self.declared.join(stream)
        _log.info("%s %s has joined", hello.kind, hello.name)
        stream.send(CoordinatorHello(self.catalogue.epoch))
        if not stream.is_node:
            self.registrations.tell_held(stream)
        self._broadcast.begin(stream)
        return stream

    def _part(self, stream: MemberStream) -> None:
        """Take in that a stream is over; if no other took its place its member is lost."""
        stream.end("it has gone")
        name = stream.hello.name
        if self.streams.get(name) is not stream:
            return
        del self.streams[name]
        if stream.is_node:
            self.declared.leave(stream)
            self._tell(Crash(name, stream.session))
        self._broadcast.plan()
        _log.info("%s %s has parted: %s", stream.hello.kind, name, stream.ended.result())

    async def _converse(self, stream: MemberStream, context: Context) -> None:
        """Read and write until either ends, or the stream is ended.

        A write is never cancelled: gRPC could not end the call then. One that hangs keeps nobody but itself.
        """
        reader = asyncio.create_task(self._read(stream, context))
        writer = asyncio.create_task(stream.write_all(context.write))
        tasks: Sequence[asyncio.Future[Any]] = (reader, writer, stream.ended)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            reader.cancel()
            (outcome,) = await asyncio.gather(reader, return_exceptions=True)
            if isinstance(outcome, ControlFault):
                self._garbage.line(f"{stream.hello.kind} {stream.hello.name}: {outcome}")
                stream.end("it sent what means nothing")
            elif isinstance(outcome, Exception) and not isinstance(outcome, grpc.aio.BaseError):
                _log.error("%s is dropped", stream.hello.name, exc_info=outcome)
            self._part(stream)
            await asyncio.gather(writer, return_exceptions=True)

    async def _read(self, stream: MemberStream, context: Context) -> None:
        while isinstance(frame := await context.read(), bytes):
            self._hear(stream, read_from_member(frame))

    def _hear(self, stream: MemberStream, message: FromMember) -> None:
        """Take in one message. Raises ControlFault for one that its sender should not have sent."""
        if stream.ended.done():
            return
        match message:
            case ReportChange() if stream.is_node:
                self._hear_report(stream, stream.reports.decode(message))
            case RouterReportChange() if not stream.is_node:
                stream.report = stream.router_reports.decode(message)
                self._tell(stream.report)
            case Declares() if stream.is_node:
                self.declared.declare(stream, message)
                self._broadcast.plan()
            case LeaveAsk(session=session) if stream.is_node:
                self._tell(Leave(stream.hello.name, session))
            case Answer():
                stream.answered(message)
            case StatusAsk() if not stream.is_node:
                stream.send(self.status.answer(message))
            case Ask() if not stream.is_node:
                self._answer(stream, message)
            case _:
                raise ControlFault(f"a {stream.hello.kind} sent {type(message).__name__}")

    def _hear_report(self, stream: MemberStream, report: Report) -> None:
        stream.report, stream.session = report, max(stream.session, report.session)
        self._tell(report)

    def _answer(self, stream: MemberStream, ask: Ask) -> None:
        if stream.asked >= _MOST_OWN_ASKS:
            stream.send(Answer.failed(ask.number, NotInTime("too much is asked at once", RETRY_AFTER_S)))
            return
        stream.asked += 1
        self._start(self._do(stream, ask))

    async def _do(self, stream: MemberStream, ask: Ask) -> None:
        try:
            stream.send(await self.registrations.answer(ask))
        except ControlFault as fault:
            stream.end(str(fault))
        finally:
            stream.asked -= 1

    def _start(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
