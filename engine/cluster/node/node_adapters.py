"""Make adapters known to a node that requests are sent with, from its own folders or from other members."""

from collections.abc import Sequence
from typing import Protocol

from engine.cluster.view import ClusterView
from engine.errors import AdapterFailed, adapter_errors
from engine.waiting.task_pool import TaskPool
from lora.adapter import AdapterRef
from lora.errors import AdapterUnreachable, UnknownAdapter
from lora.sources.source_url import SourceUrl
from lora.store.registry import AdapterRegistry
from transport.base import Address

_THREADS = 8
_MOST_WAIT_S = 30.0


class PlacedSource(Protocol):
    """A store that learns contents from other members."""

    def learn(self, ref: AdapterRef, name: str, sources: Sequence[Address]) -> None:
        """Make a content known that one of `sources` has. It waits.

        Raises UnknownAdapter, AdapterUnreachable or AdapterRefused.
        """
        ...

    def fetch(self, ref: AdapterRef, url: SourceUrl) -> None:
        """Make a content known that is to be at a URL. It waits. Raises AdapterRefused."""
        ...


def learn(placed: PlacedSource, view: ClusterView, ref: AdapterRef, sources: Sequence[Address]) -> None:
    """Make a content known by whoever has it: members first, then the URL that its name was registered from.

    Raises UnknownAdapter, AdapterUnreachable or AdapterRefused.
    """
    try:
        placed.learn(ref, ref.name, sources)
    except (UnknownAdapter, AdapterUnreachable):
        url = view.source_of(ref)
        if url is None:
            raise
        placed.fetch(ref, url)


class NodeAdapters:
    """An AdapterSource. Used on one event loop; files and members are waited for in threads of its own."""

    def __init__(
        self, registry: AdapterRegistry, view: ClusterView, name: str, placed: PlacedSource | None
    ) -> None:
        """Serve the node called `name`. Without `placed` only its own names are looked at."""
        self._registry, self._view, self._name, self._placed = registry, view, name, placed
        self._pool = TaskPool("adapter", _THREADS, _MOST_WAIT_S)

    async def learn(self, ref: AdapterRef) -> None:
        """Make `ref` known. Raises AdapterFailed or NotInTime."""
        with adapter_errors(ref.name):
            await self._pool.run(lambda: self._learn(ref))

    def sources(self, ref: AdapterRef) -> tuple[Address, ...]:
        """List the members that may have a content: those that the table names first, then the others."""
        members = self._view.members
        homes = [share.node for share in self._view.table.shares.get(ref, ())]
        order = dict.fromkeys([*homes, *members])
        found = [members[name].peer_address for name in order if name in members and name != self._name]
        return tuple(_address(text) for text in found if text)

    def close(self) -> None:
        """Begin nothing more."""
        self._pool.close()

    def _learn(self, ref: AdapterRef) -> None:
        if self._has(ref):
            return
        if self._placed is None:
            raise AdapterFailed(f"no member can give adapter {ref.name!r} of digest {ref.digest[:12]}")
        learn(self._placed, self._view, ref, self.sources(ref))

    def _has(self, ref: AdapterRef) -> bool:
        """Tell whether this node's own name means the content, read now if it was not before."""
        try:
            return self._registry.folder(ref.name) is not None and self._registry.resolve(ref.name) == ref
        except UnknownAdapter:
            return False


def _address(text: str) -> Address:
    host, _, port = text.rpartition(":")
    return Address(host, int(port))
