"""Name where an adapter is, beyond the folders of this machine: a URL, checked, and shown without its secrets."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

MOST_URL_CHARS = 2048
HTTP_SCHEMES = ("http", "https")
_BEGINNING = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,31}://")
_ALLOWED = re.compile(r"[!-~]+")  # printable ASCII without spaces
_HOST = re.compile(r"\[[0-9a-f:.]+\]|[a-z0-9._-]+", re.IGNORECASE)
_REVISION = re.compile(r"[A-Za-z0-9._-]+(?:/[A-Za-z0-9._-]+)*")
_DEFAULT_PORTS = {"http": 80, "https": 443}
_MOST_DECODED = 3  # times that a server and what stands before it may decode a path


class InvalidSource(ValueError):
    """A text that is no URL of an adapter; it says what to give, and never repeats the text, which may hold secrets."""


@dataclass(frozen=True, slots=True)
class SourceUrl:
    """The URL of an adapter's folder: `scheme://host/segments?query`, on the hub `hf://segments@revision`.

    `str` and `repr` leave out the query, which may be a signature; `text` has all of it.
    """

    scheme: str
    host: str
    segments: tuple[str, ...]
    query: str = field(default="", repr=False)
    revision: str = ""

    @classmethod
    def parse(cls, text: str) -> "SourceUrl":
        """Read a URL. Raises InvalidSource."""
        if len(text) > MOST_URL_CHARS or not _ALLOWED.fullmatch(text) or "\\" in text:
            remedy = f"at most {MOST_URL_CHARS} printable characters of ASCII, without spaces or backslashes"
            raise InvalidSource(f"give a URL of {remedy}")
        if not is_url(text):
            raise InvalidSource("give a URL like s3://bucket/folder, hf://org/repo or https://host/folder")
        scheme, _, rest = text.partition("://")
        scheme = scheme.lower()
        if scheme == "hf":
            return cls._of_hub(rest)
        try:
            parts = urlsplit(f"{scheme}://{rest}")
            port = parts.port
        except ValueError as error:
            raise InvalidSource("give a URL whose host and port are sound") from error
        if "@" in parts.netloc:
            raise InvalidSource("give a URL without a user and a password: these belong in the environment")
        if parts.fragment or (parts.query and scheme not in HTTP_SCHEMES):
            raise InvalidSource("give a URL without a fragment, and with a query for http and https only")
        host = parts.netloc.rpartition(":")[0] if port is not None else parts.netloc.rstrip(":")
        if (host or scheme != "file") and (not _HOST.fullmatch(host) or scheme == "file"):
            raise InvalidSource("give a URL with a host or a bucket; a file's has none: file:///folder")
        if scheme in HTTP_SCHEMES:
            host = host.lower()
        if port is not None and port != _DEFAULT_PORTS.get(scheme):
            host = f"{host}:{port}"
        return cls(scheme, host, _segments(parts.path), parts.query)

    @classmethod
    def _of_hub(cls, rest: str) -> "SourceUrl":
        path, separator, revision = rest.partition("@")
        segments = _segments(path)
        if "?" in rest or "#" in rest or not 1 <= len(segments) <= 2:
            raise InvalidSource("give hf://org/repo or hf://org/repo@revision")
        if separator and (not _REVISION.fullmatch(revision) or ".." in revision):
            raise InvalidSource(
                "give a revision of letters, digits and any of ._-, with single slashes inside"
            )
        return cls("hf", "", segments, "", revision)

    @property
    def text(self) -> str:
        """The whole URL, with what may be secret."""
        return f"{self}?{self.query}" if self.query else str(self)

    @property
    def shown(self) -> str:
        """The URL as anybody may see it."""
        return f"{self}?(hidden)" if self.query else str(self)

    @property
    def path(self) -> Path:
        """The folder that a `file` URL names."""
        return Path("/", *(unquote(segment) for segment in self.segments))

    def of_file(self, file: str) -> "SourceUrl":
        """Return the URL of a file in this folder."""
        return SourceUrl(self.scheme, self.host, (*self.segments, file), self.query, self.revision)

    def __str__(self) -> str:
        path = "/".join(self.segments)
        if self.scheme == "hf":
            return f"hf://{path}@{self.revision}" if self.revision else f"hf://{path}"
        return f"{self.scheme}://{self.host}/{path}" if path else f"{self.scheme}://{self.host}"


AdapterSource = Path | SourceUrl
"""Where an adapter is: a folder of this machine, or a URL."""


def is_url(text: str) -> bool:
    """Tell whether a text is meant as a URL, and not as a path."""
    return _BEGINNING.match(text) is not None


def source_of(text: str) -> AdapterSource:
    """Read what names an adapter's place. Raises InvalidSource for a URL that is none."""
    return SourceUrl.parse(text) if is_url(text) else Path(text)


def source_text(source: AdapterSource) -> str:
    """Write a place whole, as `source_of` reads it: for files and members that keep it, not for logs or answers."""
    return source.text if isinstance(source, SourceUrl) else str(source)


def shown_source(text: str) -> str:
    """Return what anybody may see of a URL."""
    try:
        return SourceUrl.parse(text).shown
    except InvalidSource:
        return "(hidden)"


def quoted(name: str, scheme: str) -> str:
    """Write a name as a part of a URL's path."""
    return quote(name, safe="") if scheme in HTTP_SCHEMES else name


def _segments(path: str) -> tuple[str, ...]:
    """Split a path. Raises InvalidSource for what some server might read as another path."""
    inner = path.removeprefix("/").removesuffix("/")
    segments = tuple(inner.split("/")) if inner else ()
    for segment in segments:
        decoded = segment
        for _ in range(_MOST_DECODED):
            decoded = unquote(decoded)
        if not decoded.isprintable() or decoded in ("", ".", "..") or "/" in decoded or "\\" in decoded:
            raise InvalidSource(
                "give a URL whose path has no empty parts, no . or .., and no encoded slashes"
            )
    return segments
