"""Change the catalogue on a client's behalf: a node reads, checks and tries a folder before a name means it."""

from engine.catalogue.alias_targets import Targets, check_is_no_target
from engine.catalogue.base import CatalogueEntry, EntrySettings
from engine.catalogue.catalogue_file import RegisteredName
from engine.cluster.control.ask_messages import RETRY_AFTER_S, Answer, Ask
from engine.cluster.control.control_values import ControlFault, WireEntry
from engine.cluster.control.declared_names import DeclaredNames
from engine.cluster.control.member_stream import MemberStream
from engine.cluster.control.shared_catalogue import SharedCatalogue
from engine.errors import AdapterExists, EngineError, InvalidAdapterName, NotInTime
from lora.adapter import NAME_RULE, is_name

LOAD_S = 300.0
_UNLOAD_S = 10.0


class Registrations:
    """What routers ask of the catalogue. Used on one event loop."""

    def __init__(
        self, catalogue: SharedCatalogue, declared: DeclaredNames, streams: dict[str, MemberStream]
    ) -> None:
        """Work with `streams`, the connected members by name, which the coordinator's server keeps."""
        self._catalogue, self._declared, self._streams = catalogue, declared, streams

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
