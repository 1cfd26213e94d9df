"""Have names that the catalogue lacks looked for where the operator's template says: a node fetches what is there.

What is not there, or cannot be served, is not looked for again for a while. Requests for one name wait together.
"""

import asyncio
import time
from collections import OrderedDict

from engine.cluster.view import AdapterAdministration, ClusterView
from engine.errors import (
    AdapterAbsent,
    AdapterExists,
    EngineError,
    InvalidAdapter,
    InvalidAdapterName,
    NotInTime,
    UnknownModel,
)
from lora.sources.allowed_sources import SourceTemplate

_MOST_AT_ONCE = 16  # so that administrators still have their turn at the coordinator
_MOST_FAILED = 4096  # names
_TOLD_S = 10.0  # for the coordinator to tell of a name that it has confirmed
_RETRY_AFTER_S = 2


class NameFinder:
    """Registers names by their template. Used on one event loop."""

    def __init__(
        self,
        view: ClusterView,
        administration: AdapterAdministration,
        template: SourceTemplate | None,
        absent_s: float,
    ) -> None:
        """Find nothing without a template."""
        self._view, self._administration = view, administration
        self._template, self._absent_s = template, absent_s
        self._failed: OrderedDict[str, tuple[float, EngineError]] = OrderedDict()  # until when, and why
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def may_find(self, name: str) -> bool:
        """Tell whether a name, which is not the base's, is one to look for."""
        if self._template is None or not self._view.known or name in self._view.catalogue:
            return False
        known = self._failed.get(name)
        is_absent = known is not None and time.monotonic() < known[0] and isinstance(known[1], UnknownModel)
        return not is_absent and self._template.of(name) is not None

    async def find(self, name: str) -> None:
        """Have a name registered if it can be found. Raises UnknownModel, InvalidAdapter, AdapterFailed, NotInTime."""
        if not self.may_find(name):
            return
        known = self._failed.get(name)
        if known is not None and time.monotonic() < known[0]:
            raise known[1]
        task = self._tasks.get(name)
        if task is None:
            if len(self._tasks) >= _MOST_AT_ONCE:
                raise NotInTime(f"{_MOST_AT_ONCE} adapters are being looked for already", _RETRY_AFTER_S)
            task = self._tasks[name] = asyncio.create_task(self._find(name))
            task.add_done_callback(lambda done: self._forget(name, done))
        await asyncio.shield(task)

    async def close(self) -> None:
        """Look for nothing more."""
        for task in tuple(self._tasks.values()):
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _find(self, name: str) -> None:
        url = self._template.of(name) if self._template is not None else None
        assert url is not None, "only such names are looked for"
        try:
            await self._administration.register(name, url, False)
        except AdapterExists:
            pass  # another router has found it
        except (AdapterAbsent, InvalidAdapterName):
            raise self._remembered(name, UnknownModel(name)) from None
        except InvalidAdapter as error:
            self._remembered(name, error)
            raise
        await self._told(name)

    async def _told(self, name: str) -> None:
        """Wait until the view has a name that was registered."""
        told = asyncio.Event()
        self._view.changed.append(told.set)
        try:
            async with asyncio.timeout(_TOLD_S):
                while name not in self._view.catalogue:
                    await told.wait()
                    told.clear()
        except TimeoutError:
            raise NotInTime(f"the coordinator has not told of {name} yet", _RETRY_AFTER_S) from None
        finally:
            self._view.changed.remove(told.set)

    def _remembered(self, name: str, error: EngineError) -> EngineError:
        self._failed.pop(name, None)
        self._failed[name] = (time.monotonic() + self._absent_s, error)
        if len(self._failed) > _MOST_FAILED:
            self._failed.popitem(last=False)
        return error

    def _forget(self, name: str, done: asyncio.Task[None]) -> None:
        del self._tasks[name]
        if not done.cancelled():
            done.exception()  # whoever asked may have left, and then nobody else takes it
