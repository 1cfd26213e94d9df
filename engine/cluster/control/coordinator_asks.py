"""Change the cluster's catalogue by asking its coordinator, over whichever stream there is."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc

from engine.cluster.control.control_messages import RETRY_AFTER_S, Answer, Ask, FromMember, RouterAct
from engine.cluster.control.control_values import MOST_FOLDER_CHARS
from engine.cluster.view import CatalogueEntry
from engine.errors import InvalidAdapter, InvalidAdapterName, NotInTime
from lora.adapter import NAME_RULE, is_name

_ANSWER_S = 330.0  # longer than a node may take to load
_MOST_ASKS = 32  # at once, as the coordinator takes them
WriteMessage = Callable[[FromMember], Awaitable[None]]


class CoordinatorAsks:
    """AdapterAdministration by way of the coordinator. Used on one event loop."""

    def __init__(self) -> None:
        self._write: WriteMessage | None = None
        self._asks: dict[int, asyncio.Future[Answer]] = {}
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

    def answered(self, answer: Answer) -> None:
        """Take in an answer; one that nobody waits for any more is of no account."""
        waiting = self._asks.get(answer.number)
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)

    async def register(self, name: str, folder: Path, replaces: bool) -> CatalogueEntry:
        """Register an adapter. As AdapterAdministration.register."""
        if len(str(folder)) > MOST_FOLDER_CHARS:
            raise InvalidAdapter(f"lora_path has {len(str(folder))} characters: at most {MOST_FOLDER_CHARS}")
        return _entry(name, await self._ask("register", name, str(folder), replaces))

    async def remove(self, name: str) -> None:
        """Remove a name. As AdapterAdministration.remove."""
        (await self._ask("remove", name)).check(name)

    async def set_alias(self, name: str, target: str) -> CatalogueEntry:
        """Let `name` mean what `target` means now. Raises InvalidAdapterName, UnknownModel or NotInTime."""
        answer = await self._ask("alias", name, target)
        if answer.fault == "unknown":
            answer.check(target)
        return _entry(name, answer)

    async def _ask(self, act: RouterAct, name: str, folder: str = "", replaces: bool = True) -> Answer:
        """Ask the coordinator for something. Raises InvalidAdapterName, NotInTime."""
        if not is_name(name):
            raise InvalidAdapterName(name, f"choose another name: give {NAME_RULE}")
        if self._write is None:
            reason = (
                "the catalogue of adapters cannot be changed while no coordinator answers (--coordinator)"
            )
            raise NotInTime(reason, RETRY_AFTER_S)
        if len(self._asks) >= _MOST_ASKS:
            raise NotInTime(f"{_MOST_ASKS} changes of the catalogue are under way", RETRY_AFTER_S)
        self._numbers += 1
        number = self._numbers
        waiting: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._asks[number] = waiting
        try:
            await self._write(Ask(number, act, name, folder, replaces))
            async with asyncio.timeout(_ANSWER_S):
                return await waiting
        except (TimeoutError, grpc.aio.BaseError, asyncio.InvalidStateError):
            raise NotInTime("the coordinator gave no answer", RETRY_AFTER_S) from None
        finally:
            del self._asks[number]


def _entry(name: str, answer: Answer) -> CatalogueEntry:
    answer.check(name)
    if answer.entry is None:
        raise NotInTime("the coordinator gave another answer than was asked", RETRY_AFTER_S)
    return answer.entry.entry()
