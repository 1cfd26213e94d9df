"""Keep on a single server what its pinned names mean: it stays known, and comes back to the device by itself."""

import asyncio
import logging
from contextlib import suppress

from engine.errors import EngineError
from engine.waiting.adapter_names import AdapterNames
from lora.adapter import AdapterRef
from lora.errors import UnknownAdapter
from lora.store.kept_adapters import KeptAdapters

_EVERY_S = 1.0
_AGAIN_TICKS = 10  # until a name that could not be read is read again
_log = logging.getLogger(__name__)


class PinnedNames:
    """The pinned names, and the contents that are kept for them. Used on one event loop."""

    def __init__(self, kept: KeptAdapters, names: AdapterNames) -> None:
        """Pin nothing. `kept` is this server's alone: no coordinator orders what it keeps."""
        self._kept, self._names = kept, names
        self._pinned: dict[str, AdapterRef | None] = {}  # with the content that is kept for it
        self._task: asyncio.Task[None] | None = None

    def pin(self, name: str) -> None:
        """Keep what a name means, now and later."""
        if name not in self._pinned:
            self._pinned[name] = None
        if self._task is None:
            self._task = asyncio.create_task(self._keep_up())

    def unpin(self, name: str) -> None:
        """Keep it no more, unless another pinned name means the same."""
        self._drop(self._pinned.pop(name, None))

    async def close(self) -> None:
        """Follow the names no more."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def _keep_up(self) -> None:
        ticks = 0
        while True:
            for name in tuple(self._pinned):
                await self._follow(name, may_read=ticks % _AGAIN_TICKS == 0)
            self._kept.look()
            ticks += 1
            await asyncio.sleep(_EVERY_S)

    async def _follow(self, name: str, may_read: bool) -> None:
        """Keep what a name means now instead of what it meant before."""
        ref = self._names.known(name)
        if ref is None and (may_read or self._pinned.get(name) is None):
            try:
                ref = await self._names.resolve(name)
            except EngineError as error:
                _log.info("pinned adapter %s cannot be kept for now: %s", name, error)
        if ref is None or name not in self._pinned:
            return
        before = self._pinned[name]
        if ref != before or not self._kept.keeps(ref):
            with suppress(UnknownAdapter):  # it was loaded anew meanwhile, and is looked at again
                self._kept.keep(ref)
                self._pinned[name] = ref
                if ref != before:
                    self._drop(before)

    def _drop(self, ref: AdapterRef | None) -> None:
        if ref is not None and ref not in self._pinned.values():
            self._kept.drop(ref)
