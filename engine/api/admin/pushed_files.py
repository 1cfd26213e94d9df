"""Write an adapter that is sent as a multipart body into a folder, bounded in bytes and time.

Nothing is held but the piece on its way, and files are written in threads. What does not become a whole folder is
removed.
"""

import asyncio
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from aiohttp import BodyPartReader, web

from engine.api.errors import ApiError, refused
from engine.api.server.body import NO_MULTIPART, ignore_part_warnings, let_come
from engine.waiting.task_pool import TaskPool
from lora.format.adapter_files import MOST_CONFIG_BYTES, WEIGHTS_FILE, short
from lora.format.peft_config import CONFIG_FILE

_PARTS: Mapping[str, str] = {"config": CONFIG_FILE, "weights": WEIGHTS_FILE}
_PIECE_BYTES = 1 << 20
_MOST_OVERHEAD_BYTES = 1 << 16  # the parts' own headers
_STAGED = ".staged-"


@dataclass(frozen=True, slots=True)
class PushOptions:
    """Where adapters are kept that clients send, None for nowhere; most bytes of weights, and most seconds for all."""

    folder: Path | None = None
    most_bytes: int = 4 << 30
    timeout_s: float = 200.0


class PushedFiles:
    """Receives folders. Used on one event loop; `pool` writes."""

    def __init__(self, root: Path, options: PushOptions, pool: TaskPool) -> None:
        self._root, self._options, self._pool = root, options, pool
        ignore_part_warnings()

    async def receive(self, request: web.Request) -> Path:
        """Return a new folder with both files. Raises ApiError or NotInTime."""
        most = self._options.most_bytes + MOST_CONFIG_BYTES + _MOST_OVERHEAD_BYTES
        if request.content_type != "multipart/form-data":
            message = "send multipart/form-data with the parts config and weights"
            raise ApiError(415, message, None, "unsupported_media_type")
        if "Content-Encoding" in request.headers:
            raise ApiError(415, "send an adapter uncompressed", None, "unsupported_encoding")
        if (request.content_length or 0) > most:
            raise _too_large("the body", most)
        name = uuid.uuid4().hex
        staged, folder = self._root / f"{_STAGED}{name}", self._root / name
        try:
            await self._pool.run(lambda: staged.mkdir(parents=True))
            await let_come(request)
            async with asyncio.timeout(self._options.timeout_s):
                await self._receive(request, staged)
            await self._pool.run(lambda: staged.rename(folder))
        except TimeoutError:
            message = (
                f"the adapter did not come within {self._options.timeout_s:g} s (--lora-source-timeout-s)"
            )
            raise ApiError(408, f"{message}: send it faster", None, "timeout") from None
        except OSError as error:
            message = f"the adapter cannot be kept here ({error.strerror}): its operator has to look"
            raise ApiError(503, message, None, "not_kept", retry_after_s=30) from error
        finally:
            self._pool.begin(lambda: shutil.rmtree(staged, ignore_errors=True))
        return folder

    def remove(self, folder: Path) -> None:
        """Remove a received folder, in a thread."""
        self._pool.begin(lambda: shutil.rmtree(folder, ignore_errors=True))

    async def _receive(self, request: web.Request, folder: Path) -> None:
        """Write each part to its file."""
        missing = dict(_PARTS)
        try:
            reader = await request.multipart()
            while (part := await reader.next()) is not None:
                name = part.name if isinstance(part, BodyPartReader) else None
                if not isinstance(part, BodyPartReader) or name is None or name not in _PARTS:
                    message = f"{short(name)} is no part of an adapter: send config and weights"
                    raise ApiError(400, message, None, "unknown_part")
                if name not in missing:
                    raise refused(name, "it comes twice: send it once", "invalid_value")
                await self._write(part, folder / missing.pop(name))
        except NO_MULTIPART as error:
            message = "the body is no sound multipart/form-data: send the parts config and weights"
            raise ApiError(400, message, None, "bad_request") from error
        for name in missing:
            raise refused(name, "the part is missing: send config and weights", "missing_part")

    async def _write(self, part: BodyPartReader, path: Path) -> None:
        """Write a part, a piece at a time."""
        most = self._options.most_bytes if path.name == WEIGHTS_FILE else MOST_CONFIG_BYTES
        file = await self._pool.run(lambda: path.open("xb", buffering=0))
        try:
            nbytes, piece = 0, bytearray()
            while chunk := await part.read_chunk(_PIECE_BYTES):
                nbytes += len(chunk)
                if nbytes > most:
                    raise _too_large(f"the part {part.name}", most)
                piece += chunk
                if len(piece) >= _PIECE_BYTES:
                    await self._pool.run(lambda piece=piece: _write_all(file, piece))
                    piece = bytearray()
            await self._pool.run(lambda: _write_all(file, piece, ends=True))
        finally:
            self._pool.begin(file.close)


def _write_all(file: BinaryIO, piece: bytearray, ends: bool = False) -> None:
    rest = memoryview(piece)
    while rest:
        rest = rest[os.write(file.fileno(), rest) :]
    if ends:
        os.fsync(file.fileno())


def _too_large(what: str, most: int) -> ApiError:
    return ApiError(413, f"{what} is over {most} bytes (--lora-source-max-bytes)", None, "body_too_large")
