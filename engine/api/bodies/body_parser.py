"""Read what bodies ask for without holding up the event loop: in a thread, or in a process if they are large."""

import logging
import pickle
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TypeVar

import msgspec

from engine.api.bodies import body_worker
from engine.api.bodies.body_messages import (
    BodyFailure,
    BodySetup,
    Message,
    Question,
    ReadRequest,
    ReadResponse,
    RefusedBody,
    Told,
    unpacked_ids,
)
from engine.api.bodies.body_readers import READERS
from engine.api.bodies.tenant_models import AccountedModels, TenantModels
from engine.api.errors import ApiError
from engine.api.parsing import FetchedModels, GenerateRequest, ServedModels
from engine.errors import NotFetched, NotInTime
from engine.text.worker_process import WorkerProcess
from engine.waiting.task_pool import TaskPool

T = TypeVar("T")
LARGE_BODY_BYTES = 1 << 19
"""What is longer is not decoded in the server's own process, whose lock decoding holds: 10 ms for so many bytes."""

_MOST_S = 45.0  # for the process to say something, its start included
_RETRY_AFTER_S = 5
_log = logging.getLogger(__name__)
_MESSAGES: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


async def read_when_fetched(models: FetchedModels, read: Callable[[], Awaitable[T]]) -> T:
    """Read a body; a model that is to be fetched before is awaited, while no thread waits, and the body read again."""
    try:
        return await read()
    except NotFetched as error:
        await models.find(error.name)
        return await read()


class BodyParser:
    """Reads bodies by their path; a large one waits for the large ones before it, and for no other.

    Each is read for a tenant: what that may not use is unknown.
    """

    def __init__(self, models: AccountedModels, pool: TaskPool) -> None:
        """Read in `pool` what is not large."""
        self._models, self._pool = models, pool
        self._process = BodyProcess(models)
        self._large = TaskPool("large body", 1)

    async def request(self, path: str, body: bytearray, tenant: str = "") -> GenerateRequest:
        """Read what is to be generated. Raises what `engine.api.parsing` raises, or NotInTime."""
        found = await self._read(path, body, tenant)
        assert isinstance(found, GenerateRequest)
        return found

    async def response(self, path: str, body: bytearray, tenant: str = "") -> bytes:
        """Read a body that asks for nothing of the engine; return its response. Raises as `request`."""
        found = await self._read(path, body, tenant)
        assert isinstance(found, bytes)
        return found

    def close(self) -> None:
        """Take nothing more, and end the process."""
        self._large.close()
        self._process.close()

    async def _read(self, path: str, body: bytearray, tenant: str) -> GenerateRequest | bytes:
        models = TenantModels(self._models, tenant)
        return await read_when_fetched(models, lambda: self._read_once(path, body, models))

    async def _read_once(self, path: str, body: bytearray, models: FetchedModels) -> GenerateRequest | bytes:
        if len(body) > LARGE_BODY_BYTES:
            return await self._large.run(lambda: self._process.read(path, body, models))
        return await self._pool.run(lambda: READERS[path](bytes(body), models))


class BodyProcess:
    """Reads one body at a time in a process of its own, which is started when first needed."""

    def __init__(self, models: ServedModels, most_s: float = _MOST_S) -> None:
        """Start nothing yet. What the process needs of `models` is written now, since that takes a moment."""
        self._models, self._most_s = models, most_s
        setup = BodySetup(models.tokenizer, models.model_name, models.max_model_len, models.vocab_size)
        self._setup = pickle.dumps(setup)
        self._lock = threading.Lock()
        self._worker: WorkerProcess | None = None

    def read(self, path: str, body: bytearray, models: ServedModels | None = None) -> GenerateRequest | bytes:
        """Read a body, for somebody who sees `models`.

        Raises ApiError, NotInTime, or what the models raise of the model that it names.
        """
        with self._lock:
            worker, is_fresh = self._running()
            try:
                if is_fresh:
                    worker.send(self._setup)
                worker.send(path.encode())
                worker.send(body)
                return self._read(worker, models or self._models)
            except OSError:
                code = worker.end()
                if self._worker is not worker:  # `close` has ended it
                    raise NotInTime("reading the request body was given up", _RETRY_AFTER_S) from None
                self._worker = None
                if code is None:
                    reason = f"the request body was not read within {self._most_s:g} s"
                    raise NotInTime(reason, _RETRY_AFTER_S) from None
                _log.error("the process that reads large bodies has ended with %d", code)
                message = "reading the request body ended its process, perhaps for want of memory: send less"
                raise ApiError(413, message, None, "body_too_large") from None

    def close(self) -> None:
        """End the process, whatever it reads; a later body starts another."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.kill()

    def _running(self) -> tuple[WorkerProcess, bool]:
        """Return the process, and whether it was started now and has to be set up."""
        if (worker := self._worker) is not None and worker.is_alive():
            return worker, False
        program = ["-m", body_worker.__name__]
        self._worker = WorkerProcess(self, "read a large body", program, (), self._most_s)
        return self._worker, True

    def _read(self, worker: WorkerProcess, models: ServedModels) -> GenerateRequest | bytes:
        while True:
            match _MESSAGES.decode(worker.receive()):
                case Question() as question:
                    _answer(worker, question, models)
                case ReadRequest(request, count):
                    prompts = [unpacked_ids(worker.receive()) for _ in range(count)]
                    return replace(request, prompts=tuple(prompts))
                case ReadResponse():
                    return worker.receive()
                case RefusedBody(status, message, param, code, retry_after_s):
                    raise ApiError(status, message, param, code, retry_after_s)
                case BodyFailure(traceback):
                    raise RuntimeError(f"a large body could not be read:\n{traceback}")


def _answer(worker: WorkerProcess, question: Question, models: ServedModels) -> None:
    """Say what is asked; of a model that cannot be asked now the error is raised, and the body given up."""
    if question.about == "served":
        worker.send(msgspec.msgpack.encode(Told(served=models.may_serve(question.model))))
        return
    told = Told()
    try:
        told = Told(companions=models.tokenizer_of(question.model).companions)
    finally:
        worker.send(msgspec.msgpack.encode(told))
