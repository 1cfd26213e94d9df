"""Answer browsers: the page, its files, and the events that fill it."""

from http import HTTPStatus

from aiohttp import web

from engine.api.base import ObservedServer
from engine.api.errors import ApiError
from engine.api.guard import RECORD
from engine.api.page.event_feed import EventFeed
from engine.api.page.page_assets import INDEX, PageAssets
from engine.api.page.page_tables import PageTables
from engine.metrics.adapter_totals import TBT_BOUNDS_S, TTFT_BOUNDS_S
from engine.metrics.series import CollectSeries
from engine.waiting.task_pool import TaskPool

_OWN_SITES = ("same-origin", "none")
_STREAM = {"Content-Type": "text/event-stream", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class PageRoutes:
    """The handlers of the page; there are none where nobody may watch."""

    def __init__(
        self,
        server: ObservedServer,
        pool: TaskPool,
        collect: CollectSeries,
        most_watchers: int,
        answers: bool = True,
    ) -> None:
        """Show what `server` tells to `most_watchers` clients at once; `answers` if it may be asked something."""
        self._assets, self._most = PageAssets(answers), most_watchers
        bounds = {"bounds": {"ttft": TTFT_BOUNDS_S, "tbt": TBT_BOUNDS_S}}
        self._feed = EventFeed(PageTables(server, pool, collect).collect, most_watchers, bounds)

    def table(self) -> list[web.RouteDef]:
        """List the routes."""
        if not self._most:
            return []
        return [
            web.get("/", self._index, allow_head=False),
            web.get("/page/events", self._events, allow_head=False),
            web.get("/page/{file}", self._file, allow_head=False),
        ]

    async def close(self, _: web.Application) -> None:
        """End all streams: a server that stops waits for nobody who watches."""
        await self._feed.close()

    async def _index(self, request: web.Request) -> web.Response:
        return self._assets.response(INDEX)

    async def _file(self, request: web.Request) -> web.Response:
        return self._assets.response(request.match_info["file"])

    async def _events(self, request: web.Request) -> web.StreamResponse:
        """Stream events until the client leaves, does not keep up, or the server ends."""
        if (
            request.headers.get("Sec-Fetch-Site", "none") not in _OWN_SITES
        ):  # a page from elsewhere, in a browser here
            message = "only the page that this server serves may watch: open it at this server's address"
            raise ApiError(HTTPStatus.FORBIDDEN, message, None, "other_site")
        response = web.StreamResponse(headers=_STREAM)
        async with self._feed.watch(lambda: request.transport and request.transport.abort()) as watcher:
            try:
                await response.prepare(request)
                async for event in watcher.events():
                    await response.write(event)
                await response.write_eof()
            except ConnectionError:
                request[RECORD].client_gone = True
        return response
