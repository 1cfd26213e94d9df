"""Serve files and batches over HTTP as OpenAI does: /v1/files and /v1/batches."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

from aiohttp import web

from engine.api import schema
from engine.api.base import EngineClient
from engine.api.bodies.body_parser import LARGE_BODY_BYTES
from engine.api.errors import refused
from engine.api.guard import RECORD, json_response
from engine.api.server.body import BodyReader, wait_with_continue
from engine.api.server.multipart_form import FormPart, MultipartForm
from engine.batches.batch_operations import DESCRIPTION
from engine.batches.batch_queue import BatchQueue
from engine.batches.batch_records import BatchObject, FileObject, NewBatch
from engine.batches.batch_store import BatchStore
from engine.batches.client_files import ClientFiles, check_filename
from engine.config.batches_config import BatchesConfig
from engine.metrics.series import MetricSeries
from engine.waiting.task_pool import TaskPool

_FIELD_BYTES = 1 << 10
_DEFAULT_LISTED, _MOST_LISTED = 20, 100
_MOST_FILES = 10_000
Listed = TypeVar("Listed", FileObject, BatchObject)


class BatchRoutes:
    """The files and batches of one server, and the handlers of their routes."""

    def __init__(self, client: EngineClient, config: BatchesConfig, body_timeout_s: float) -> None:
        """Open the folder of `config`, where files and batches are. Each MiB of a file has `body_timeout_s` to come.

        Raises InvalidConfig if the folder cannot be used.
        """
        assert config.batch_dir is not None, "the caller has looked"
        self._pool = TaskPool("batch file", 1)
        self._store = BatchStore(config.batch_dir)
        self._files = ClientFiles(self._store, self._pool, config)
        self._queue = BatchQueue(client, self._store, self._pool, config.batch_in_flight)
        self._form, self._closed = MultipartForm(("file", "purpose"), body_timeout_s), False
        self.description = DESCRIPTION

    async def start(self) -> None:
        """Go on with what an earlier server has not finished."""
        await self._queue.start()

    async def close(self) -> None:
        """Answer no more lines, and let another server use the folder. Doing it again changes nothing."""
        if self._closed:
            return
        self._closed = True
        await self._queue.close()
        await self._pool.run_or_leave("the store of files and batches", self._store.close)
        self._pool.close()

    def series(self) -> Sequence[MetricSeries]:
        """Tell how many batches there are, and what is left of them."""
        return self._queue.series()

    def table(self, bodies: BodyReader) -> Sequence[web.RouteDef]:
        """List the routes; `bodies` reads what is no file."""

        async def create(request: web.Request) -> web.Response:
            async with bodies.read(request, LARGE_BODY_BYTES) as body:
                wire = schema.decoded(bytes(body), NewBatch)
            return json_response(await self._queue.create(request[RECORD].tenant, wire))

        return [
            web.post("/v1/files", self._upload, expect_handler=wait_with_continue),
            web.get("/v1/files", self._list_files, allow_head=False),
            web.get("/v1/files/{file_id}", self._file, allow_head=False),
            web.delete("/v1/files/{file_id}", self._remove),
            web.get("/v1/files/{file_id}/content", self._content, allow_head=False),
            web.post("/v1/batches", create, expect_handler=wait_with_continue),
            web.get("/v1/batches", self._list_batches, allow_head=False),
            web.get("/v1/batches/{batch_id}", self._batch, allow_head=False),
            web.post("/v1/batches/{batch_id}/cancel", self._cancel),
        ]

    async def _upload(self, request: web.Request) -> web.Response:
        told: dict[str, str] = {}

        async def take(part: FormPart) -> None:
            if part.name == "purpose":
                told["purpose"] = await part.text(_FIELD_BYTES)
                return
            told["filename"] = check_filename(part.filename)
            async for piece in part.pieces():
                await upload.write(piece)

        async with self._files.upload() as upload:
            await self._form.receive(request, take)
            if told["purpose"] != "batch":
                remedy = f"{told['purpose']!r} is not supported: give 'batch'"
                raise refused("purpose", remedy, "invalid_value")
            return json_response(await self._files.keep(upload, request[RECORD].tenant, told["filename"]))

    async def _list_files(self, request: web.Request) -> web.Response:
        query = _query(request, "purpose", "order")
        order = query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise refused("order", f"{order!r} is not supported: give 'asc' or 'desc'", "invalid_value")
        found = await self._files.list(request[RECORD].tenant, query.get("purpose"), order == "asc")
        return json_response(_page(found, query, _MOST_FILES, _MOST_FILES))

    async def _file(self, request: web.Request) -> web.Response:
        return json_response(await self._files.one(request[RECORD].tenant, request.match_info["file_id"]))

    async def _remove(self, request: web.Request) -> web.Response:
        file_id = request.match_info["file_id"]
        await self._files.remove(request[RECORD].tenant, file_id)
        return json_response({"id": file_id, "object": "file", "deleted": True})

    async def _content(self, request: web.Request) -> web.StreamResponse:
        path = await self._files.content(request[RECORD].tenant, request.match_info["file_id"])
        return web.FileResponse(path, headers={"Content-Type": "application/jsonl"})

    async def _list_batches(self, request: web.Request) -> web.Response:
        query = _query(request)
        found = await self._queue.list(request[RECORD].tenant)
        return json_response(_page(found, query, _DEFAULT_LISTED, _MOST_LISTED))

    async def _batch(self, request: web.Request) -> web.Response:
        return json_response(await self._queue.one(request[RECORD].tenant, request.match_info["batch_id"]))

    async def _cancel(self, request: web.Request) -> web.Response:
        return json_response(await self._queue.cancel(request[RECORD].tenant, request.match_info["batch_id"]))


def _query(request: web.Request, *more: str) -> Mapping[str, str]:
    """Return what a list is asked for. Raises ApiError for a parameter that it does not know."""
    for name in request.query:
        if name not in ("after", "limit", *more):
            raise refused(name, "the list has no such parameter: leave it out", "unknown_field")
    return request.query


def _page(found: Sequence[Listed], query: Mapping[str, str], default: int, most: int) -> dict[str, object]:
    """Return OpenAI's list of those after `after`, at most `limit`. Raises ApiError for what is neither."""
    given = query.get("limit", str(default))
    if not (given.isascii() and given.isdigit() and len(given) < 9 and 1 <= int(given) <= most):
        raise refused("limit", f"{given!r} is not accepted: give a number from 1 to {most}", "invalid_value")
    if (after := query.get("after")) is not None:
        at = next((at for at, each in enumerate(found) if each.id == after), None)
        if at is None:
            raise refused(
                "after", f"{after!r} is not in the list: give the id of one that is", "invalid_value"
            )
        found = found[at + 1 :]
    data = found[: int(given)]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    more = len(found) > len(data)
    return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": more}
