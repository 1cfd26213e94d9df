"""Do on a client's behalf what routers ask: change the catalogue, and hold or abort by name at every router.

A node reads, checks and tries a folder before a name means it.
"""

import asyncio
from typing import Literal

from engine.catalogue.alias_targets import Targets, check_is_no_target
from engine.catalogue.base import MOST_HELD_S, CatalogueEntry, EntrySettings
from engine.catalogue.catalogue_file import RegisteredName
from engine.cluster.control.ask_messages import RETRY_AFTER_S, Answer, Ask
from engine.cluster.control.control_values import ControlFault, WireEntry
from engine.cluster.control.declared_names import DeclaredNames
from engine.cluster.control.member_stream import MemberStream
from engine.cluster.control.shared_catalogue import SharedCatalogue
from engine.errors import AdapterExists, EngineError, InvalidAdapterName, NotInTime, UnknownModel
from engine.live.held_names import HeldNames
from lora.adapter import NAME_RULE, is_name

LOAD_S = 300.0
_UNLOAD_S = 10.0
_ROUTER_S = 5.0


class Registrations:
    """What routers ask for. Used on one event loop.

    Which names are held is in no file: a coordinator that begins anew does not know it. Routers do.
    """

    def __init__(
        self, catalogue: SharedCatalogue, declared: DeclaredNames, streams: dict[str, MemberStream]
    ) -> None:
        """Work with `streams`, the connected members by name, which the coordinator's server keeps."""
        self._catalogue, self._declared, self._streams = catalogue, declared, streams
        self._held = HeldNames(MOST_HELD_S)

    async def answer(self, ask: Ask) -> Answer:
        """Do what a router asks, and answer it."""
        try:
            match ask.act:
                case "register":
                    entry = await self.register(ask.name, ask.folder, ask.replaces)
                case "alias":
                    entry = await self.set_alias(ask.name, ask.folder, ask.targets)
                case "set":
                    settings = EntrySettings(ask.pinned, ask.max_requests)
                    entry = await self._catalogue.set(ask.name, settings)
                case "remove":
                    await self.remove(ask.name)
                    return Answer(ask.number)
                case "hold":
                    await self.hold(ask.name, ask.seconds)
                    return Answer(ask.number)
                case "abort":
                    return Answer(ask.number, aborted=await self.abort(ask.name))
                case _:
                    raise ControlFault(f"a router asks to {ask.act} a name")
        except EngineError as error:
            return Answer.failed(ask.number, error)
        return Answer(ask.number, WireEntry.of(entry))

    async def register(self, name: str, folder: str, replaces: bool) -> CatalogueEntry:
        """Have a node load a folder, then let `name` mean it.

        Raises InvalidAdapterName, AdapterExists, InvalidAdapter, AdapterFailed or NotInTime; then the name means what
        it did.
        """
        self._check(name, replaces)
        if not self._declared.hold(name):
            raise NotInTime(f"adapter {name} is being read already", RETRY_AFTER_S)
        try:
            return await self._register(name, folder, replaces)
        finally:
            self._declared.release(name)

    async def _register(self, name: str, folder: str, replaces: bool) -> CatalogueEntry:
        node = self._choose(name)
        answer = await node.ask("load", name, LOAD_S, folder)
        answer.check(name)
        if answer.entry is None or answer.entry.name != name:
            raise NotInTime(f"node {node.hello.name} gave another answer than was asked", RETRY_AFTER_S)
        entry = answer.entry.entry()
        if not await self._catalogue.put(RegisteredName(entry), lambda known: replaces or known is None):
            raise AdapterExists(name)
        await self._unload(name, node)
        return entry

    async def set_alias(self, name: str, target: str, targets: Targets = ()) -> CatalogueEntry:
        """Let `name` mean what `target` means now. Raises InvalidAdapterName, UnknownModel, NotInTime."""
        self._check(name, True)
        return await self._catalogue.set_alias(name, target, targets)

    async def remove(self, name: str) -> None:
        """Let a name mean nothing, also at the nodes that declare it. Raises UnknownModel or NotInTime."""
        check_is_no_target(name, self._catalogue.targets())
        await self._catalogue.remove(name)
        await self._unload(name, None)

    async def hold(self, name: str, seconds: float) -> None:
        """Let a name take no requests at any router for so long; 0 releases it.

        Raises UnknownModel, or NotInTime where a router did not confirm it: then the others hold it.
        """
        if name not in self._catalogue.names:
            raise UnknownModel(name)
        self._held.hold(name, seconds)
        await self._ask_routers("hold", name, seconds)

    async def abort(self, name: str) -> int:
        """End the requests that routers have under a name, which may be the base's; return how many they were.

        Raises UnknownModel where there are none and the name is no adapter's, NotInTime as `hold`.
        """
        count = sum(each.aborted for each in await self._ask_routers("abort", name))
        if not count and name not in self._catalogue.names:
            raise UnknownModel(name)
        return count

    def tell_held(self, router: MemberStream) -> None:
        """Tell a router that has joined, perhaps anew, what was held and released meanwhile."""
        for name, seconds in self._held.told().items():
            router.tell("hold", name, seconds)

    async def _ask_routers(
        self, act: Literal["hold", "abort"], name: str, seconds: float = 0.0
    ) -> list[Answer]:
        """Have every router do something; one that leaves meanwhile needs not."""
        routers = [each for each in self._streams.values() if not each.is_node]
        asks = (each.ask(act, name, _ROUTER_S, seconds=seconds) for each in routers)
        found = await asyncio.gather(*asks, return_exceptions=True)
        answers: list[Answer] = []
        for router, answer in zip(routers, found, strict=True):
            if isinstance(answer, Answer):
                answer.check(name)
                answers.append(answer)
            elif not router.ended.done():
                raise answer
        return answers

    def _check(self, name: str, replaces: bool) -> None:
        if not is_name(name):
            raise InvalidAdapterName(name, f"choose another name: give {NAME_RULE}")
        if not replaces and name in self._catalogue.names:
            raise AdapterExists(name)

    def _choose(self, name: str) -> MemberStream:
        """Return the node that is to load a folder: one that has the name already, else one with little to do."""
        nodes = [each for each in self._streams.values() if each.is_node and not each.ended.done()]
        if not nodes:
            raise NotInTime("no node is there that could load the adapter", RETRY_AFTER_S)
        having = self._declared.who_declares(name)
        return min(nodes, key=lambda each: (each not in having, each.asks, each.hello.name))

    async def _unload(self, name: str, keeps: MemberStream | None) -> None:
        """Have nodes that declare a name forget it, so that none keeps a content that the name means no more."""
        others = [each for each in self._declared.who_declares(name) if each is not keeps]
        self._declared.forget(name)
        for node in others:
            try:
                await node.ask("unload", name, _UNLOAD_S)
            except NotInTime:
                continue  # it forgets the name when it starts anew, or keeps it and harms nobody
