"""Find out, for requests on an event loop, what adapter names mean, and change what they mean.

Files and peers are waited for in threads of their own, and never without an end. It may not know requests.
"""

import asyncio
from collections.abc import Sequence

from engine.errors import InvalidAdapterName, adapter_errors
from engine.waiting.task_pool import TaskPool
from lora.adapter import BASE, AdapterEntry, AdapterRef, is_name
from lora.errors import InvalidName
from lora.format.allowed_roots import AllowedRoots
from lora.sources.source_url import AdapterSource, SourceUrl
from lora.store.registry import AdapterRegistry

_THREADS = 8
_MOST_WAIT_S = 300.0  # what reads files and asks peers has deadlines of its own, which are sooner
_MOST_FETCHES = 64  # names that wait for a thread, which a slow source keeps long


class AdapterNames:
    """The names that requests may give: the base model's and the registry's. Used on one event loop."""

    def __init__(self, base_names: Sequence[str], registry: AdapterRegistry, asks_peers: bool) -> None:
        """Let `base_names` mean the base model; `asks_peers` tells that unknown names may be a peer's."""
        self._base_names = base_names
        self._registry = registry
        self._asks_peers = asks_peers
        self._pool = TaskPool("adapter", _THREADS, _MOST_WAIT_S)
        self._fetches = TaskPool("source", _THREADS, _MOST_WAIT_S, _MOST_FETCHES)
        self._resolving: dict[str, asyncio.Task[AdapterRef]] = {}

    def entries(self) -> tuple[AdapterEntry, ...]:
        """List the adapters that requests may name."""
        return self._registry.entries()

    def may_serve(self, model: str) -> bool:
        """Return False if `model` is neither the base nor an adapter; True also for what may be found elsewhere."""
        known = model in self._base_names or model in self._registry.names()
        return known or ((self._asks_peers or self._registry.may_fetch(model)) and is_name(model))

    def may_fetch(self, model: str) -> bool:
        """Tell whether to resolve a name may take as long as a source does: `find` is to be awaited before."""
        return model not in self._base_names and self._registry.may_fetch(model)

    async def find(self, model: str) -> None:
        """Have what a name means fetched, if that is to be. Raises as `resolve`."""
        if self.may_fetch(model):
            await self.resolve(model)

    async def load(self, name: str, folder: AdapterSource, replaces: bool, roots: AllowedRoots) -> AdapterRef:
        """Read, check and register an adapter; `replaces` says that the name may mean something already.

        Raises InvalidAdapterName, AdapterExists, InvalidAdapter, AdapterFailed or NotInTime.
        """
        with adapter_errors(name):
            pool = self._fetches if isinstance(folder, SourceUrl) else self._pool
            return await pool.run(lambda: self._registry.load(name, folder, replaces, roots))

    async def alias(self, name: str, target: str) -> AdapterEntry:
        """Let `name` mean what `target` means now; return what is told of it.

        Raises InvalidAdapterName for the name, UnknownModel for the target, InvalidAdapter, AdapterFailed or NotInTime.
        """
        with adapter_errors(target):
            try:
                return await self._pool.run(lambda: self._registry.alias(name, target))
            except InvalidName as error:
                raise InvalidAdapterName(name, error.reason) from error

    def known(self, name: str) -> AdapterRef | None:
        """Return what a name means, if that can be told without waiting."""
        return self._registry.known(name)

    def unload(self, name: str) -> None:
        """Forget a name at once; requests that run under it finish. Raises UnknownModel."""
        with adapter_errors(name):
            self._registry.unload(name)

    async def resolve(self, model: str) -> AdapterRef:
        """Return what a name means. Raises UnknownModel, PeersSilent, InvalidAdapter, AdapterFailed, NotInTime."""
        if model in self._base_names:
            return BASE
        if (known := self._registry.known(model)) is not None:
            return known
        with adapter_errors(model):
            return await asyncio.shield(self._task(model))

    def close(self) -> None:
        """Begin nothing more; nobody waits for what has begun."""
        self._pool.close()
        self._fetches.close()

    def _task(self, model: str) -> asyncio.Task[AdapterRef]:
        """Return the one task that finds out what a name means, for all who ask meanwhile: it takes one thread."""
        task = self._resolving.get(model)
        if task is None:
            pool = self._fetches if self._registry.may_fetch(model) else self._pool
            work = pool.run(lambda: self._registry.resolve(model))
            task = self._resolving[model] = asyncio.create_task(work)
            task.add_done_callback(lambda done: self._forget(model, done))
        return task

    def _forget(self, model: str, done: asyncio.Task[AdapterRef]) -> None:
        del self._resolving[model]
        if not done.cancelled():
            done.exception()  # whoever asked may have left, and then nobody else takes it
