"""Let web pages of chosen origins talk to the server: CORS, as the Fetch standard defines it.

Credentials in its sense (cookies) are never allowed: a page sends its key itself.
"""

import re
from collections.abc import Sequence

from aiohttp import web

from engine.api.guard import Handler

_METHODS = "GET, POST"
_EXPOSED = "X-Request-Id, Retry-After"
_MAX_AGE_S = 600  # for which a browser need not ask again
_HEADER_NAMES = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~, -]{1,2048}")


@web.middleware
class Cors:
    """Answers browsers' preflights, and marks every response to a page of one of `origins`; "*" stands for all."""

    def __init__(self, origins: Sequence[str]) -> None:
        self._origins = frozenset(origin.lower() for origin in origins)

    async def __call__(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answer a preflight, which bears no key; leave everything else to `handler`."""
        asks = request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers
        if not (asks and self._allowed(request)):
            return await handler(request)
        headers = {"Access-Control-Allow-Methods": _METHODS, "Access-Control-Max-Age": str(_MAX_AGE_S)}
        wanted = request.headers.get("Access-Control-Request-Headers", "")
        if _HEADER_NAMES.fullmatch(wanted):  # a client library adds headers of its own
            headers["Access-Control-Allow-Headers"] = wanted
        return web.Response(status=204, headers=headers)

    async def mark(self, request: web.Request, response: web.StreamResponse) -> None:
        """Allow the page to read a response that is about to be sent, whatever its status."""
        if not self._origins:
            return
        if "*" not in self._origins:
            response.headers.add("Vary", "Origin")
        if origin := self._allowed(request):
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Expose-Headers"] = _EXPOSED

    def _allowed(self, request: web.Request) -> str:
        """Return the origin to allow, "" for none."""
        origin = request.headers.get("Origin", "")
        if origin and "*" in self._origins:
            return "*"
        return origin if origin.lower() in self._origins else ""
