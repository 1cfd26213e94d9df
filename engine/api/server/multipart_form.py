"""Receive a multipart body, one part after the other and a piece at a time, so that nothing more of it is held."""

import asyncio
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable

from aiohttp import (
    BadContentDispositionHeader,
    BadContentDispositionParam,
    BodyPartReader,
    MultipartReader,
    web,
)
from aiohttp.http_exceptions import BadHttpMessage

from engine.api.errors import ApiError, refused
from engine.api.server.body import let_come

_CHUNK_BYTES, _PIECE_BYTES = 1 << 18, 1 << 20
_NO_FORM = (ValueError, AssertionError, RuntimeError, BadHttpMessage, web.RequestPayloadError)  # aiohttp's
_NAME_CHARS = 80  # of what a client named, in an answer


class FormPart:
    """A part of a body that comes. Read it once, by `pieces` or by `text`."""

    def __init__(self, name: str, part: BodyPartReader, progress_s: float) -> None:
        """Let each piece have `progress_s` to come."""
        self.name, self.filename = name, part.filename
        self._part, self._progress_s = part, progress_s

    async def pieces(self) -> AsyncIterator[bytearray]:
        """Yield the content in pieces of a MiB or little more. Raises TimeoutError if one does not come in time."""
        while True:
            piece = bytearray()
            async with asyncio.timeout(self._progress_s):
                while len(piece) < _PIECE_BYTES and (chunk := await self._part.read_chunk(_CHUNK_BYTES)):
                    piece += chunk
            if not piece:
                return
            yield piece

    async def text(self, most_bytes: int) -> str:
        """Return the content's first `most_bytes`. Raises TimeoutError, or ValueError for what is no text."""
        async with asyncio.timeout(self._progress_s):
            return (await self._part.read_chunk(most_bytes)).decode()


class MultipartForm:
    """What a body has to be: multipart/form-data with each of `parts` once, and nothing else."""

    def __init__(self, parts: tuple[str, ...], progress_s: float) -> None:
        """Let each MiB have `progress_s` to come."""
        self._parts, self._progress_s = parts, progress_s
        for warning in (BadContentDispositionHeader, BadContentDispositionParam):
            warnings.simplefilter("ignore", warning)  # clients' mistakes: they are answered, and fill no log

    async def receive(self, request: web.Request, take: Callable[[FormPart], Awaitable[None]]) -> None:
        """Let `take` read each part. Raises ApiError for a body that is no such form, and what `take` raises."""
        wanted = " and ".join(self._parts)
        if request.content_type != "multipart/form-data":
            message = (
                f"the body is {request.content_type[:_NAME_CHARS]}: send multipart/form-data with {wanted}"
            )
            raise ApiError(415, message, None, "unsupported_type")
        if "Content-Encoding" in request.headers:
            raise ApiError(415, "send the parts uncompressed", None, "unsupported_encoding")
        await let_come(request)
        missing = list(self._parts)
        try:
            parts = MultipartReader(request.headers, request.content)
            while (part := await self._next(parts)) is not None:
                if part.name not in missing:
                    twice = part.name in self._parts
                    remedy = "it comes twice: send it once" if twice else f"send {wanted}, and nothing else"
                    raise refused(
                        part.name[:_NAME_CHARS] or "body",
                        remedy,
                        "invalid_value" if twice else "unknown_part",
                    )
                missing.remove(part.name)
                await take(part)
        except TimeoutError:
            message = f"{_PIECE_BYTES} bytes did not come within {self._progress_s:g} s: send them faster"
            raise ApiError(408, message, None, "timeout") from None
        except _NO_FORM as error:
            message = f"the body is no sound multipart/form-data: send the parts {wanted}"
            raise ApiError(400, message, None, "bad_request") from error
        for name in missing:
            raise refused(name, f"the part is missing: send {wanted}", "missing_part")

    async def _next(self, parts: MultipartReader) -> FormPart | None:
        async with asyncio.timeout(self._progress_s):
            part = await parts.next()
        if part is None:
            return None
        if not isinstance(part, BodyPartReader):
            raise ValueError("a part is multipart itself")
        return FormPart(part.name or "", part, self._progress_s)
