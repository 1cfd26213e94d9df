"""Read the file of tenants again and again, and let a server hold what it says now.

A file that cannot be used changes nothing: the log says what is wrong with it, once. It may not know who asks.
"""

import asyncio
import logging
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Protocol

from engine.config.config import ServeConfig
from engine.errors import InvalidConfig, NotInTime
from engine.tenants.tenant import Tenant
from engine.waiting.task_pool import TaskPool

_PERIOD_S = 2.0
_log = logging.getLogger(__name__)


class TenantHolder(Protocol):
    """What holds tenants to something."""

    def adopt(self, tenants: Iterable[Tenant]) -> None:
        """Hold these from now on, and no others."""
        ...


class TenantWatch:
    """The tenants of a server, as its files say. Used on one event loop."""

    def __init__(self, config: ServeConfig, holders: Sequence[TenantHolder]) -> None:
        """Let `holders` adopt the tenants now, and again when they have changed. Raises InvalidConfig."""
        self._config, self._holders = config, holders
        self._pool = TaskPool("tenants' file", 1)
        self._flaw = ""
        self._tenants = self._read()
        self._adopt(self._tenants)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look at the file, if there is one."""
        if self._config.tenants.file is not None:
            self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Look no more."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        self._pool.close()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(_PERIOD_S)
            try:
                found = await self._pool.run(self._read)
            except (NotInTime, InvalidConfig) as error:
                self._tell(str(error))
                continue
            self._flaw = ""
            if found != self._tenants:
                self._tenants = found
                self._adopt(found)
                _log.info("the tenants have changed: %s", ", ".join(each.name for each in found))

    def _adopt(self, tenants: tuple[Tenant, ...]) -> None:
        for holder in self._holders:
            holder.adopt(tenants)

    def _read(self) -> tuple[Tenant, ...]:
        return self._config.tenants.read_for(self._config.access, self._config.cluster)

    def _tell(self, flaw: str) -> None:
        if flaw != self._flaw:
            self._flaw = flaw
            _log.error("the tenants stay as they were: %s", flaw)
