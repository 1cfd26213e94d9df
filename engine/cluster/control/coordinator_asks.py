"""Change the cluster's catalogue by asking its coordinator, over whichever stream there is."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import grpc
import msgspec

from engine.catalogue.alias_targets import Targets
from engine.catalogue.base import AdapterRecord, CatalogueEntry, ClusterRecord, EntrySettings
from engine.cluster.control.ask_messages import RETRY_AFTER_S, Answer, Ask, RouterAct, StatusAsk, StatusTold
from engine.cluster.control.control_messages import FromMember
from engine.cluster.control.control_values import MOST_FOLDER_CHARS
from engine.errors import InvalidAdapter, InvalidAdapterName, NotInTime, UnknownModel
from lora.adapter import MOST_NAME_CHARS, NAME_RULE, is_name
from lora.sources.source_url import AdapterSource, source_text

T = TypeVar("T")
_STATUS_S = 5.0
_ANSWER_S = 330.0  # longer than a node may take to load
_MOST_ASKS = 32  # at once, as the coordinator takes them
WriteMessage = Callable[[FromMember], Awaitable[None]]


class CoordinatorAsks:
    """AdapterAdministration by way of the coordinator. Used on one event loop."""

    def __init__(self) -> None:
        self._write: WriteMessage | None = None
        self._asks: dict[int, asyncio.Future[Answer | StatusTold]] = {}
        self._numbers = 0

    def connect(self, write: WriteMessage) -> None:
        """Ask over a stream that has begun."""
        self._write = write

    def disconnect(self) -> None:
        """Take in that the stream has ended: whoever waits for an answer is told so."""
        self._write = None
        for waiting in self._asks.values():
            if not waiting.done():
                waiting.set_exception(NotInTime("the coordinator has gone", RETRY_AFTER_S))

    def answered(self, answer: Answer | StatusTold) -> None:
        """Take in an answer; one that nobody waits for any more is of no account."""
        waiting = self._asks.get(answer.number)
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)

    async def register(self, name: str, folder: AdapterSource, replaces: bool) -> CatalogueEntry:
        """Register an adapter. As AdapterAdministration.register."""
        text = source_text(folder)
        if len(text) > MOST_FOLDER_CHARS:
            raise InvalidAdapter(f"lora_path has {len(text)} characters: at most {MOST_FOLDER_CHARS}")
        return _entry(name, await self._ask("register", name, text, replaces))

    async def remove(self, name: str) -> None:
        """Remove a name. As AdapterAdministration.remove."""
        (await self._ask("remove", name)).check(name)

    async def set_alias(self, name: str, target: str, targets: Targets = ()) -> CatalogueEntry:
        """Let `name` mean what `target` means now. Raises InvalidAdapterName, UnknownModel or NotInTime."""
        return _entry(name, await self._ask("alias", name, target, targets=targets))

    async def set(self, name: str, settings: EntrySettings) -> None:
        """Ask something else for a name. Raises InvalidAdapterName, UnknownModel or NotInTime."""
        answer = await self._ask("set", name, pinned=settings.pinned, max_requests=settings.max_requests)
        answer.check(name)

    async def hold(self, name: str, seconds: float) -> None:
        """Hold a name, or release it. As AdapterAdministration.hold."""
        await self._ask_by_name("hold", name, seconds)

    async def abort(self, name: str) -> int:
        """End requests under a name. As AdapterAdministration.abort."""
        return (await self._ask_by_name("abort", name)).aborted

    async def cluster(self) -> ClusterRecord:
        """Describe the cluster. Raises NotInTime."""
        return self._read(await self._send(StatusAsk(self._next(), "cluster")), ClusterRecord)

    async def adapters(self, after: str, limit: int) -> list[AdapterRecord]:
        """Describe the first `limit` names after `after`. Raises NotInTime."""
        ask = StatusAsk(self._next(), "adapters", after, limit)
        return self._read(await self._send(ask), list[AdapterRecord])

    async def adapter(self, name: str) -> AdapterRecord | None:
        """Describe one name, if there is one. Raises NotInTime."""
        found = self._read(await self._send(StatusAsk(self._next(), "adapter", name)), list[AdapterRecord])
        return found[0] if found else None

    async def _ask(
        self,
        act: RouterAct,
        name: str,
        folder: str = "",
        replaces: bool = True,
        pinned: int | None = None,
        max_requests: int | None = None,
        targets: Targets = (),
    ) -> Answer:
        """Ask the coordinator to change something. Raises InvalidAdapterName, NotInTime."""
        if not is_name(name):
            raise InvalidAdapterName(name, f"choose another name: give {NAME_RULE}")
        return await self._answer(
            Ask(self._next(), act, name, folder, replaces, pinned, max_requests, targets)
        )

    async def _ask_by_name(self, act: RouterAct, name: str, seconds: float = 0.0) -> Answer:
        """Ask about the requests under a name, which may be the base's. Raises UnknownModel, NotInTime."""
        if not 0 < len(name) <= MOST_NAME_CHARS:
            raise UnknownModel(name)
        answer = await self._answer(Ask(self._next(), act, name, seconds=seconds))
        answer.check(name)
        return answer

    async def _answer(self, ask: Ask) -> Answer:
        answer = await self._send(ask)
        if not isinstance(answer, Answer):
            raise _other()
        return answer

    def _next(self) -> int:
        self._numbers += 1
        return self._numbers

    async def _send(self, ask: Ask | StatusAsk) -> Answer | StatusTold:
        """Ask, and wait for the answer. Raises NotInTime."""
        if self._write is None:
            reason = "nothing can be changed while no coordinator answers (--coordinator)"
            raise NotInTime(reason, RETRY_AFTER_S)
        if len(self._asks) >= _MOST_ASKS:
            raise NotInTime(f"{_MOST_ASKS} questions to the coordinator are under way", RETRY_AFTER_S)
        waiting: asyncio.Future[Answer | StatusTold] = asyncio.get_running_loop().create_future()
        self._asks[ask.number] = waiting
        try:
            await self._write(ask)
            async with asyncio.timeout(_ANSWER_S if isinstance(ask, Ask) else _STATUS_S):
                return await waiting
        except (TimeoutError, grpc.aio.BaseError, asyncio.InvalidStateError):
            raise NotInTime("the coordinator gave no answer", RETRY_AFTER_S) from None
        finally:
            del self._asks[ask.number]

    def _read(self, answer: Answer | StatusTold, kind: type[T]) -> T:
        """Read what was told of the cluster. Raises NotInTime."""
        if not isinstance(answer, StatusTold):
            raise _other()
        try:
            return msgspec.msgpack.decode(answer.content, type=kind)
        except msgspec.MsgspecError:
            raise _other() from None


def _other() -> NotInTime:
    return NotInTime("the coordinator gave another answer than was asked", RETRY_AFTER_S)


def _entry(name: str, answer: Answer) -> CatalogueEntry:
    answer.check(name)
    if answer.entry is None:
        raise _other()
    return answer.entry.entry()
