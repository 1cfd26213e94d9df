"""Read adapters' files over HTTP, from where they were cut if the server can do that.

A redirect is followed only to what may be fetched. Nothing is decompressed, so what arrives is what is counted.
"""

import http.client
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from email.message import Message
from typing import IO

from lora.format.adapter_files import Flaw, PassingFlaw
from lora.sources.allowed_sources import AllowedSources
from lora.sources.base import NOTHING_HELD, HeldFile, SourceForbidden
from lora.sources.source_url import InvalidSource, SourceUrl

_SOCKET_S = 20.0  # for the server to say anything
_RANGE = re.compile(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18})")
_ABSENT, _FORBIDDEN, _PASSING = (404, 410), (401, 403), (408, 425, 429)
MayFollow = Callable[[str], bool]
"""Whether a redirect may be followed to this URL."""


class HttpFile:
    """An OpenedFile of a response."""

    def __init__(self, response: http.client.HTTPResponse, at: int, version: str) -> None:
        """Read a response's body, which begins at `at`. Raises Flaw for one that is no plain file."""
        self._response, self.version = response, version
        headers = response.headers
        if headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
            raise Flaw(
                "its server sends compressed files though it was asked not to: have it send them plain"
            )
        length = headers.get("Content-Length", "")
        rest = int(length) if length.isascii() and length.isdecimal() and len(length) < 19 else None
        self.start, self.size = 0, rest
        if response.status == http.client.PARTIAL_CONTENT:
            found = _RANGE.fullmatch(headers.get("Content-Range", "").strip())
            if found is None or int(found[1]) != at:
                raise PassingFlaw("its server sent another part of the file than was asked for: try again")
            self.start, self.size = at, int(found[2])

    def read(self, most: int) -> bytes:
        """As OpenedFile.read."""
        try:
            return self._response.read1(most)
        except http.client.HTTPException as error:
            raise ConnectionError(type(error).__name__) from error

    def close(self) -> None:
        """As OpenedFile.close."""
        self._response.close()


def open_http(
    url: str, held: HeldFile, may_follow: MayFollow, headers: Mapping[str, str] | None = None
) -> HttpFile | None:
    """Ask for a file. As SourceFiles.open."""
    asked = {"Accept-Encoding": "identity", "User-Agent": "loraserve", **(headers or {})}
    if held.version and held.is_whole:
        condition = "If-Modified-Since" if _is_date(held.version) else "If-None-Match"
        asked[condition] = held.version
    elif held.version and held.nbytes and not held.version.startswith("W/"):
        asked |= {"Range": f"bytes={held.nbytes}-", "If-Range": held.version}
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _AllowedRedirects(may_follow),
    ):
        opener.add_handler(handler)
    try:
        response = opener.open(urllib.request.Request(url, headers=asked), timeout=_SOCKET_S)
    except urllib.error.HTTPError as error:
        error.close()
        return _answered(error.code, url, held, may_follow, headers)
    except (urllib.error.URLError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise ConnectionError(type(reason).__name__) from error
    if response is None:  # no handler of its scheme
        raise Flaw("its server sends on to what is no HTTP server: give the URL of the files themselves")
    version = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
    try:
        return HttpFile(response, held.nbytes, version)
    except Flaw:
        response.close()
        raise


def _answered(
    status: int, url: str, held: HeldFile, may_follow: MayFollow, headers: Mapping[str, str] | None
) -> HttpFile | None:
    """Tell what an answer means that is no file."""
    if status == http.client.NOT_MODIFIED and held.is_whole:
        return None
    if status == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and held.nbytes:
        whole = {name: value for name, value in (headers or {}).items() if name != "Range"}
        return open_http(url, NOTHING_HELD, may_follow, whole)
    if status in _ABSENT:
        raise FileNotFoundError(str(status))
    if status in _PASSING or status >= 500:
        raise ConnectionError(f"status {status}")
    kind = SourceForbidden if status in _FORBIDDEN else Flaw
    raise kind(f"its server answers with status {status}: check the URL, and that this server may read it")


class HttpFiles:
    """SourceFiles of http:// and https://. It holds nothing, so any number of threads may call it."""

    def __init__(self, allowed: AllowedSources) -> None:
        """Follow redirects only to what is allowed."""
        self._allowed = allowed

    def open(self, url: SourceUrl, file: str, held: HeldFile) -> HttpFile | None:
        """As SourceFiles.open."""

        def may_follow(target: str) -> bool:
            try:
                return self._allowed.allows_redirect(url, SourceUrl.parse(target))
            except InvalidSource:
                return False

        return open_http(url.of_file(file).text, held, may_follow)


class _AllowedRedirects(urllib.request.HTTPRedirectHandler):
    max_redirections = 5

    def __init__(self, may_follow: MayFollow) -> None:
        self._may_follow = may_follow

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> urllib.request.Request | None:
        """Follow a redirect, or refuse the source."""
        if not self._may_follow(newurl):
            fp.close()
            raise Flaw(
                "its server sends on to a URL outside of what --lora-source allows: allow that as well"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]


def _is_date(version: str) -> bool:
    return not version.startswith(('"', "W/"))
