"""Count what routers moved to other nodes, from their metrics, though a router that is killed forgets its count."""

import asyncio
import re
from collections.abc import Mapping

import aiohttp

_EVERY_S = 0.5
_TIMES = aiohttp.ClientTimeout(total=2.0)
_MOVED = re.compile(r"^loraserve_requests_moved_total ([0-9.e+]+)$", re.MULTILINE)


class MoveCounts:
    """The counts of all routers: of each the last that was read before it began anew, and the present one."""

    def __init__(self, session: aiohttp.ClientSession, routers: Mapping[str, str]) -> None:
        """Read from the addresses of `routers`, which are by name."""
        self._session, self._routers = session, routers
        self._now = dict.fromkeys(routers, 0)
        self._before = 0

    @property
    def total(self) -> int:
        """Return the moves that were seen; those of a killed router's last moment are not among them."""
        return self._before + sum(self._now.values())

    async def watch(self) -> None:
        """Look again and again until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(_EVERY_S)

    async def look(self) -> None:
        """Read every router's count once."""
        for name, address in self._routers.items():
            try:
                async with self._session.get(f"{address}/metrics", timeout=_TIMES) as response:
                    found = _MOVED.search(await response.text())
            except (aiohttp.ClientError, ConnectionError, TimeoutError):
                continue
            count = int(float(found.group(1))) if found is not None else 0
            if count < self._now[name]:
                self._before += self._now[name]
            self._now[name] = count
