"""Hold the coordinator's end of one member's stream: what waits to be sent, what was asked, and why it ended.

Everything is bounded: a member that does not take what it is sent is dropped, and begins anew.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from engine.cluster.control.ask_messages import RETRY_AFTER_S, Answer, Ask, MemberAct
from engine.cluster.control.control_messages import FromCoordinator, MemberHello, encoded
from engine.cluster.control.control_values import ControlFault
from engine.cluster.control.report_codec import ReportDecoder, RouterReportDecoder
from engine.errors import NotInTime
from scheduler.cluster.protocol.messages import Report, RouterReport

MOST_WAITING_FRAMES = 4096
MOST_WAITING_BYTES = 64 << 20
MOST_ASKS = 64
SendFrame = Callable[[bytes], Awaitable[object]]


class MemberStream:
    """One connection of one member, from its hello on. Used on one event loop."""

    def __init__(self, hello: MemberHello) -> None:
        self.hello = hello
        self.session = hello.start  # of its last report
        self.report: Report | RouterReport | None = None
        self.reports = ReportDecoder(hello.name)
        self.router_reports = RouterReportDecoder(hello.name)
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.asked = 0  # asks of the member's own that are being answered
        self._frames: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._more = asyncio.Event()
        self._asks: dict[int, asyncio.Future[Answer]] = {}
        self._numbers = 0

    @property
    def is_node(self) -> bool:
        """Tell a node from a router."""
        return self.hello.kind == "node"

    @property
    def asks(self) -> int:
        """Count what the member was asked and has not answered."""
        return len(self._asks)

    def send(self, message: FromCoordinator) -> None:
        """Send a message after those that wait."""
        self.send_frame(encoded(message))

    def send_frame(self, frame: bytes) -> None:
        """Send an encoded message after those that wait; ends the stream if too much waits."""
        if self.ended.done():
            return
        self._frames.append(frame)
        self._waiting_bytes += len(frame)
        if len(self._frames) > MOST_WAITING_FRAMES or self._waiting_bytes > MOST_WAITING_BYTES:
            self.end("it does not take what it is sent")
        self._more.set()

    async def write_all(self, write: SendFrame) -> None:
        """Write what is to be sent, until the stream is ended; the write under way is brought to its end."""
        while not self.ended.done():
            while self._frames and not self.ended.done():
                frame = self._frames.popleft()
                self._waiting_bytes -= len(frame)
                await write(frame)
            self._more.clear()
            if not self.ended.done():
                await self._more.wait()

    async def ask(
        self, act: MemberAct, name: str, timeout_s: float, folder: str = "", seconds: float = 0.0
    ) -> Answer:
        """Have the member do something. Raises NotInTime if it has too much to do, leaves, or gives no answer."""
        if self.ended.done() or len(self._asks) >= MOST_ASKS:
            raise NotInTime(f"{self.hello.kind} {self.hello.name} is busy or gone", RETRY_AFTER_S)
        number = self._next()
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._asks[number] = answer
        self.send(Ask(number, act, name, folder, seconds=seconds))
        try:
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError:
            reason = f"{self.hello.kind} {self.hello.name} gave no answer within {timeout_s:g} s"
            raise NotInTime(reason, RETRY_AFTER_S) from None
        finally:
            del self._asks[number]

    def tell(self, act: MemberAct, name: str, seconds: float) -> None:
        """Have the member do something, and wait for no answer."""
        self.send(Ask(self._next(), act, name, seconds=seconds))

    def _next(self) -> int:
        self._numbers += 1
        return self._numbers

    def answered(self, answer: Answer) -> None:
        """Take in an answer; one that nobody waits for any more is of no account. Raises ControlFault."""
        if answer.number > self._numbers:
            raise ControlFault(f"an answer to ask {answer.number}, which was never sent")
        waiting = self._asks.get(answer.number)
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)

    def end(self, reason: str) -> None:
        """End the stream; whoever waits for an answer is told so."""
        if not self.ended.done():
            self.ended.set_result(reason)
            self._more.set()
        for waiting in self._asks.values():
            if not waiting.done():
                gone = NotInTime(f"{self.hello.kind} {self.hello.name} is gone", RETRY_AFTER_S)
                waiting.set_exception(gone)
