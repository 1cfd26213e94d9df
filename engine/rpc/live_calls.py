"""Know which calls generate, by the ids that their clients gave, so that they can be aborted."""

import asyncio
from collections.abc import Generator, Iterable
from contextlib import contextmanager

from engine.api.errors import ApiError, refused
from engine.rpc.rpc_generation import RpcGeneration

_MOST_SHOWN = 5


class LiveCalls:
    """The calls that have not ended. An id is its key's: with another key it may be used, and aborts nothing."""

    def __init__(self) -> None:
        self._live: dict[tuple[str, str], RpcGeneration] = {}

    def __len__(self) -> int:
        return len(self._live)

    @contextmanager
    def hold(self, key: str, request_id: str, generation: RpcGeneration, is_own: bool) -> Generator[None]:
        """Let `abort` find a call while it lasts.

        Raises ApiError if the id is live already; unless the client did not choose it (`is_own`), as proxies that
        try a call again give it the same one.
        """
        place = key, request_id
        if is_own and place in self._live:
            message = f"{request_id!r} is live already: wait for its end, or give another"
            raise refused("request_id", message, "request_exists")
        self._live.setdefault(place, generation)
        try:
            yield
        finally:
            if self._live.get(place) is generation:
                del self._live[place]

    async def abort(self, key: str, request_ids: Iterable[str]) -> None:
        """Abort calls of a key. Raises ApiError (404) that names those that are not live; the others are aborted."""
        ids = tuple(dict.fromkeys(request_ids))
        found = {each: self._live.get((key, each)) for each in ids}
        await asyncio.gather(*(each.abort() for each in found.values() if each is not None))
        if lacking := [each for each, generation in found.items() if generation is None]:
            shown = ", ".join(map(repr, lacking[:_MOST_SHOWN])) + (
                ", ..." if len(lacking) > _MOST_SHOWN else ""
            )
            message = f"request_ids: {shown} is not live, or was begun with another key"
            raise ApiError(404, message, "request_ids", "request_not_found")
