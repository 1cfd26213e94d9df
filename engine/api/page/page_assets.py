"""Hold the page's files, and the headers that keep a browser to them: nothing is fetched from anywhere else.

The files are read once, so no request names a path: what is not in the folder is not there.
"""

from collections.abc import Mapping
from importlib.resources import files
from types import MappingProxyType

from aiohttp import web

_TYPES: Mapping[str, str] = {
    "html": "text/html",
    "js": "text/javascript",
    "css": "text/css",
    "svg": "image/svg+xml",
}
INDEX = "index.html"
_ANSWERS = (b'data-serves="requests"', b'data-serves="nobody"')
"""What the page's body says where requests are answered, and where they are not: a style hides what is of requests."""

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",  # so that no text can become markup
        "trusted-types 'none'",
    )
)
HEADERS: Mapping[str, str] = MappingProxyType(
    {
        "Content-Security-Policy": POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cache-Control": "no-cache",
    }
)


class PageAssets:
    """The files of the page, by name."""

    def __init__(self, answers: bool = True) -> None:
        """Read them, for a server that answers requests or for one that does not."""
        folder = files("engine.api.page") / "static"
        self._files = {
            each.name: (each.read_bytes(), kind)
            for each in sorted(folder.iterdir(), key=lambda each: each.name)
            if (kind := _TYPES.get(each.name.rpartition(".")[2])) is not None
        }
        if not answers:
            index, kind = self._files[INDEX]
            self._files[INDEX] = index.replace(*_ANSWERS), kind

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all files."""
        return tuple(self._files)

    def response(self, name: str) -> web.Response:
        """Return a file. Raises HTTPNotFound."""
        if name not in self._files:
            raise web.HTTPNotFound
        body, kind = self._files[name]
        return web.Response(body=body, content_type=kind, charset="utf-8", headers=HEADERS)
