"""Hold a member's end of the control stream: it says who it is, reports, fills the view and obeys.

While no coordinator answers, the view stays what it was, and the stream is tried again and again. Of two coordinators
the member follows the one of the larger epoch.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, cast

import grpc
import msgspec

from engine.api.server.rate_limited_log import RateLimitedLog
from engine.cluster.control.ask_messages import Answer, Ask, StatusTold
from engine.cluster.control.control_messages import (
    CoordinatorHello,
    DropOrder,
    FromCoordinator,
    FromMember,
    LeaveAsk,
    LeaveOrder,
    MemberHello,
    PullOrder,
    RejoinOrder,
    TurnedAway,
    ViewChange,
    encoded,
    read_from_coordinator,
)
from engine.cluster.control.control_values import ControlFault
from engine.cluster.control.coordinator_asks import CoordinatorAsks, WriteMessage
from engine.cluster.control.declared_names import declared_changes
from engine.cluster.control.report_codec import ReportEncoder, RouterReportEncoder
from engine.cluster.control.view_codec import SharedView, ViewDecoder
from engine.cluster.view import ClusterView
from scheduler.cluster.protocol.messages import (
    AllowLeave,
    Command,
    Drop,
    Publish,
    Pull,
    Rejoin,
    Report,
    RouterReport,
)

PATH = "/loraserve.Control/Join"
_REPORT_S = 1.0
_HELLO_S = 30.0  # many members may join at once
_LEAST_WAIT_S, _MOST_WAIT_S = 0.2, 5.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CoordinatorConnection:
    """How a member reaches the coordinator: what makes a channel, and what each call carries as its token."""

    channel: Callable[[], grpc.aio.Channel]
    metadata: tuple[tuple[str, str], ...] = ()


class AskedMember(Protocol):
    """Whoever does what the coordinator asks of a member."""

    async def answer(self, ask: Ask) -> Answer:
        """Do what the coordinator asks."""
        ...


class ControlledNode(AskedMember, Protocol):
    """What a node does for the coordinator; a router has none. Called on the event loop."""

    @property
    def session(self) -> int:
        """Return the session under which the node reports."""
        ...

    @property
    def is_leaving(self) -> bool:
        """Tell whether the node wants to go."""
        ...

    def declared(self) -> Mapping[str, str]:
        """Return the names from the node's own options and folders, with digests, "" where none was read."""
        ...

    def obey(self, command: Command) -> None:
        """Do what the coordinator says."""
        ...


class ControlClient:
    """A member of a cluster; `administration` changes its catalogue. Used on one event loop."""

    def __init__(
        self,
        hello: MemberHello,
        connection: CoordinatorConnection,
        view: ClusterView,
        report: Callable[[], Report | RouterReport],
        node: ControlledNode | None = None,
    ) -> None:
        """Join as `hello` says once started."""
        self.view = view
        self.is_connected = False
        self._hello, self._connection, self._report, self._node = hello, connection, report, node
        self._epoch = 0
        self._told = SharedView()  # by the last change of the stream
        self.administration = CoordinatorAsks()
        self.asked: AskedMember | None = node  # of a router, whoever holds and aborts there
        self._tasks: set[asyncio.Task[None]] = set()
        self._lines = RateLimitedLog(_log, logging.WARNING)

    def start(self) -> None:
        """Begin to look for the coordinator."""
        self._start(self._stay())

    async def close(self) -> None:
        """Leave without a word; the coordinator takes the member for lost."""
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _stay(self) -> None:
        """Hold a stream to the coordinator for as long as this member lives."""
        wait_s = _LEAST_WAIT_S
        while True:
            channel = self._connection.channel()
            try:
                await self._hold(channel)
            except (TimeoutError, grpc.aio.BaseError, grpc.RpcError, asyncio.InvalidStateError) as error:
                self._lines.line(f"the coordinator does not answer: {_told(error)}")
            except ControlFault as fault:
                self._lines.line(f"the coordinator is left: {fault}")
            finally:
                await channel.close()
            wait_s = _LEAST_WAIT_S if self.is_connected else min(_MOST_WAIT_S, 2 * wait_s)
            self.is_connected = False
            await asyncio.sleep(wait_s * random.uniform(0.5, 1.0))

    async def _hold(self, channel: grpc.aio.Channel) -> None:
        """Hold one stream until it ends. Raises what ended it, if it was not the coordinator's wish."""
        call = cast(Any, channel).stream_stream(PATH)(metadata=self._connection.metadata)
        try:
            await call.write(encoded(msgspec.structs.replace(self._hello, epoch=self._epoch)))
            async with asyncio.timeout(_HELLO_S):
                self._greet(await _read(call))
            write = _writer(call)
            reporter = asyncio.create_task(self._speak(write))
            reader = asyncio.create_task(self._listen(call, write))
            try:
                done, _ = await asyncio.wait((reporter, reader), return_when=asyncio.FIRST_COMPLETED)
                for each in done:
                    each.result()
            finally:
                reader.cancel()
                reporter.cancel()
                await asyncio.gather(reader, reporter, return_exceptions=True)
        finally:
            self.administration.disconnect()
            call.cancel()

    def _greet(self, message: FromCoordinator | None) -> None:
        """Follow a coordinator that takes this member. Raises ControlFault for one that is not to be followed."""
        if isinstance(message, TurnedAway):
            raise ControlFault(f"it turns this member away: {message.reason}")
        if not isinstance(message, CoordinatorHello):
            raise ControlFault("its first message is no hello")
        if message.epoch < self._epoch:
            raise ControlFault(f"it is of epoch {message.epoch}, and one of {self._epoch} was followed")
        self._epoch, self.is_connected = message.epoch, True

    async def _speak(self, write: WriteMessage) -> None:
        """Report once a second, and tell what the node declares when that changes."""
        self.administration.connect(write)
        reports, router_reports = ReportEncoder(), RouterReportEncoder()
        declared: Mapping[str, str] = {}
        is_first = True
        while True:
            report = self._report()
            if isinstance(report, Report):
                await write(reports.encode(report))
            else:
                await write(router_reports.encode(report))
            if self._node is not None:
                now = dict(self._node.declared())
                change = declared_changes(declared, now, is_first)
                declared, is_first = now, False
                if change is not None:
                    await write(change)
                if self._node.is_leaving:
                    await write(LeaveAsk(self._node.session))
            await asyncio.sleep(_REPORT_S)

    async def _listen(self, call: Any, write: WriteMessage) -> None:
        """Take in what the coordinator says, until it ends the stream. Raises ControlFault."""
        decoder = ViewDecoder()
        while (message := await _read(call)) is not None:
            match message:
                case ViewChange():
                    self._take_in(decoder.apply(message))
                case Answer() | StatusTold():
                    self.administration.answered(message)
                case Ask() if self.asked is not None:
                    self._start(_answer(self.asked, message, write))
                case _ if self._node is not None:
                    self._command(self._node, message)
                case _:
                    raise ControlFault(f"it sent a router {type(message).__name__}")

    def _take_in(self, told: SharedView | None) -> None:
        """Replace the view; one that is not settled yet adds only, and no table gives way to an older one."""
        if told is None:
            return
        view = self.view
        view.replacements, view.nodes_wanted = told.replacements, told.nodes_wanted
        if told.settled:
            view.members, view.catalogue, view.known = told.members, told.catalogue, True
            view.routers = told.routers
        else:
            view.routers = tuple(sorted({*view.routers, *told.routers}))
            if told.members is not self._told.members:
                view.members = {**view.members, **told.members}
            if told.catalogue is not self._told.catalogue:
                view.catalogue = {**view.catalogue, **told.catalogue}
        self._told = told
        if told.table.version > view.table.version:
            view.table = told.table
            if self._node is not None:
                self._node.obey(Publish((self._hello.name,), told.table))
        view.tell()

    def _command(self, node: ControlledNode, message: FromCoordinator) -> None:
        name = self._hello.name
        match message:
            case PullOrder(session=session, number=number, adapter=adapter, sources=sources):
                node.obey(Pull(name, session, number, adapter.ref(), sources))
            case DropOrder(session=session, number=number, adapter=adapter):
                node.obey(Drop(name, session, number, adapter.ref()))
            case LeaveOrder(session=session, number=number):
                node.obey(AllowLeave(name, session, number))
            case RejoinOrder(session=session, next_session=following):
                node.obey(Rejoin(name, session, following))
            case _:
                raise ControlFault(f"it sent {type(message).__name__} amid the stream")

    def _start(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _writer(call: Any) -> WriteMessage:
    """Return what writes messages one after another, from whichever task."""
    writing = asyncio.Lock()

    async def write(message: FromMember) -> None:
        async with writing:
            await call.write(encoded(message))

    return write


async def _answer(member: AskedMember, ask: Ask, write: WriteMessage) -> None:
    answer = await member.answer(ask)
    with suppress(grpc.aio.BaseError, asyncio.InvalidStateError):  # where it broke, whoever asked knows it
        await write(answer)


async def _read(call: Any) -> FromCoordinator | None:
    """Return the next message, None at the end. Raises ControlFault, or an error of gRPC."""
    frame = await call.read()
    return read_from_coordinator(frame) if isinstance(frame, bytes) else None


def _told(error: Exception) -> str:
    return str(error.details()) if isinstance(error, grpc.aio.AioRpcError) else repr(error)
