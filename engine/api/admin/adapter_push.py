"""Take adapters that administrators send: received into a folder, loaded as any other, and versions by digest.

A name means the new content in one step. `name@digest` is an alias of it for as long as it is the newest: requests
that run keep the content that they began with, and its files stay for a while.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from http import HTTPStatus
from pathlib import Path

from aiohttp import web

from engine.api.admin.catalogue_admin import MOST_LISTED
from engine.api.admin.pushed_files import PushedFiles, PushOptions
from engine.api.base import EngineClient
from engine.api.errors import ApiError
from engine.catalogue.base import VERSION_CHARS, AdapterRecord
from engine.errors import EngineError, InvalidAdapter, InvalidAdapterName, UnknownModel
from engine.waiting.task_pool import TaskPool
from lora.adapter import MOST_NAME_CHARS, is_name
from lora.format.allowed_roots import AllowedRoots

_MOST_AT_ONCE = 4
_RETRY_AFTER_S = 5
_KEPT_S = 600.0  # the files of a content that no name means: requests that run may still need them
_WRITE_S = 120.0


class AdapterPush:
    """Puts what is sent under its name. Used on one event loop."""

    def __init__(self, client: EngineClient, options: PushOptions) -> None:
        """Take nothing without a folder."""
        self._client = client
        self._pool = TaskPool("push", _MOST_AT_ONCE, _WRITE_S)
        self._root = options.folder.resolve() if options.folder is not None else None
        self._files = PushedFiles(self._root, options, self._pool) if self._root is not None else None
        self._running = 0
        self._locks: dict[str, asyncio.Lock] = {}
        self._waiting = Counter[str]()
        self._removals: set[asyncio.Task[None]] = set()

    async def put(self, name: str, request: web.Request) -> str:
        """Receive an adapter, and let `name` mean it; return its digest.

        Raises ApiError, InvalidAdapterName, AdapterFailed or NotInTime; then the name means what it did.
        """
        files = self._files
        if files is None or self._root is None:
            message = "sending adapters is off: start the server with --lora-push-dir"
            raise ApiError(HTTPStatus.FORBIDDEN, message, None, "pushing_is_off")
        self._check_name(name)
        if self._running >= _MOST_AT_ONCE:
            message = f"{_MOST_AT_ONCE} adapters are being sent already: retry in {_RETRY_AFTER_S} s"
            raise ApiError(
                HTTPStatus.SERVICE_UNAVAILABLE, message, None, "busy", retry_after_s=_RETRY_AFTER_S
            )
        self._running += 1
        try:
            folder = await files.receive(request)
            async with self._alone(name):
                before = await self._record(name)
                try:
                    roots = AllowedRoots((self._root,))
                    ref = await self._client.load_adapter(name, folder, True, roots)
                except BaseException as error:
                    files.remove(folder)
                    if isinstance(error, InvalidAdapter):
                        raise ApiError(HTTPStatus.BAD_REQUEST, str(error), None, "invalid_adapter") from error
                    raise
                await self._name_version(name, ref.digest, before)
            if before is not None:
                self._remove_later(before)
            return ref.digest
        finally:
            self._running -= 1

    async def forget(self, name: str, before: AdapterRecord | None) -> None:
        """Let go of what came with a name, which means nothing any more, if it was sent."""
        if before is not None and self._is_pushed(before):
            if before.version is not None:
                await self._drop_version(name, before.version)
            self._remove_later(before)

    async def record(self, name: str) -> AdapterRecord | None:
        """Return what is known of a name, to `forget` afterwards; None where nothing is sent."""
        return None if self._root is None else await self._record(name)

    async def close(self) -> None:
        """Take nothing more; files that are still kept stay."""
        for task in tuple(self._removals):
            task.cancel()
        await asyncio.gather(*self._removals, return_exceptions=True)
        self._pool.close()

    def _check_name(self, name: str) -> None:
        if "@" in name:
            raise InvalidAdapterName(
                name, "a version is named by @: leave it out, it is given by the content"
            )
        if not is_name(version_name(name, "0" * VERSION_CHARS)):
            most = MOST_NAME_CHARS - VERSION_CHARS - 1
            raise InvalidAdapterName(
                name, f"give at most {most} letters, digits or any of ._:+-, and single slashes"
            )
        if name in self._client.model_names:
            raise InvalidAdapterName(name, "the base model has that name: choose another")

    @asynccontextmanager
    async def _alone(self, name: str) -> AsyncGenerator[None]:
        """Let what is sent for one name be taken in turn."""
        lock = self._locks.setdefault(name, asyncio.Lock())
        self._waiting[name] += 1
        try:
            async with lock:
                yield
        finally:
            self._waiting[name] -= 1
            if not self._waiting[name]:
                del self._waiting[name], self._locks[name]

    async def _name_version(self, name: str, digest: str, before: AdapterRecord | None) -> None:
        """Name the new content by its digest, and the one before no more."""
        version = version_name(name, digest)
        await self._client.catalogue.set_alias(version, name)
        named = await self._record(version)
        if named is not None and named.version != digest:  # somebody loaded the name anew meanwhile
            await self._client.unload_adapter(version)
        if before is not None and before.version not in (None, digest):
            await self._drop_version(name, str(before.version))

    async def _drop_version(self, name: str, digest: str) -> None:
        old = version_name(name, digest)
        named = await self._record(old)
        if named is not None and named.alias_of == name:
            with suppress(UnknownModel, InvalidAdapterName):  # an alias may lead to it by share
                await self._client.unload_adapter(old)

    async def _record(self, name: str) -> AdapterRecord | None:
        try:
            return await self._client.catalogue.record(name)
        except UnknownModel:
            return None

    def _is_pushed(self, record: AdapterRecord) -> bool:
        return self._root is not None and Path(record.source).parent == self._root

    def _remove_later(self, before: AdapterRecord) -> None:
        """Remove the files of a content after a while, unless some name is read from them."""
        if self._is_pushed(before):
            task = asyncio.create_task(self._remove(Path(before.source)))
            self._removals.add(task)
            task.add_done_callback(self._removals.discard)

    async def _remove(self, folder: Path) -> None:
        await asyncio.sleep(_KEPT_S)
        with suppress(EngineError):
            after = ""
            while page := await self._client.catalogue.records(after, MOST_LISTED):
                if any(record.source == str(folder) for record in page):
                    return
                after = page[-1].name
            if self._files is not None:
                self._files.remove(folder)


def version_name(name: str, digest: str) -> str:
    """Return the name of one version of an adapter."""
    return f"{name}@{digest[:VERSION_CHARS]}"
