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

from aiohttp import web

from engine.api.errors import ApiError
from engine.api.server.multipart_form import FormPart, MultipartForm
from engine.waiting.task_pool import TaskPool
from lora.format.adapter_files import MOST_CONFIG_BYTES, WEIGHTS_FILE
from lora.format.peft_config import CONFIG_FILE

_PARTS: Mapping[str, str] = {"config": CONFIG_FILE, "weights": WEIGHTS_FILE}
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
        self._form = MultipartForm(tuple(_PARTS), options.timeout_s)

    async def receive(self, request: web.Request) -> Path:
        """Return a new folder with both files. Raises ApiError or NotInTime."""
        most = self._options.most_bytes + MOST_CONFIG_BYTES + _MOST_OVERHEAD_BYTES
        if (request.content_length or 0) > most:
            raise _too_large("the body", most)
        name = uuid.uuid4().hex
        staged, folder = self._root / f"{_STAGED}{name}", self._root / name
        try:
            await self._pool.run(lambda: staged.mkdir(parents=True))
            async with asyncio.timeout(self._options.timeout_s):
                await self._form.receive(request, lambda part: self._write(part, staged))
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

    async def _write(self, part: FormPart, folder: Path) -> None:
        """Write a part to its file, a piece at a time."""
        most = self._options.most_bytes if part.name == "weights" else MOST_CONFIG_BYTES
        path, nbytes = folder / _PARTS[part.name], 0
        file = await self._pool.run(lambda: path.open("xb", buffering=0))
        try:
            async for piece in part.pieces():
                nbytes += len(piece)
                if nbytes > most:
                    raise _too_large(f"the part {part.name}", most)
                await self._pool.run(lambda piece=piece: _write_all(file, piece))
            await self._pool.run(lambda: os.fsync(file.fileno()))
        finally:
            self._pool.begin(file.close)


def _write_all(file: BinaryIO, piece: bytearray) -> None:
    rest = memoryview(piece)
    while rest:
        rest = rest[os.write(file.fileno(), rest) :]


def _too_large(what: str, most: int) -> ApiError:
    return ApiError(413, f"{what} is over {most} bytes (--lora-source-max-bytes)", None, "body_too_large")
