"""Read large bodies in a process of its own: `python -m engine.api.bodies.body_worker DESCRIPTOR`.

Decoding holds the interpreter's lock for as long as a body is long. Here nobody waits for that lock. The code that
reads bodies is the server's own, so that a body means the same wherever it is read.
"""

import pickle
import socket
import sys
import traceback
from dataclasses import replace
from typing import BinaryIO, Literal

import msgspec

from engine.api.bodies.body_messages import (
    BodyFailure,
    BodySetup,
    Question,
    ReadRequest,
    ReadResponse,
    RefusedBody,
    Told,
    packed_ids,
)
from engine.api.bodies.body_readers import READERS
from engine.api.errors import FORESEEN, as_api_error
from engine.api.parsing import ServedModels
from engine.text.bounded_jobs import LENGTH
from engine.tokenizer import Tokenizer


class GivenUp(Exception):
    """The owner has an error for this body, and waits for no answer."""


class _Owner:
    """The other end of the socket, and the models as it tells of them."""

    def __init__(self, incoming: BinaryIO, outgoing: BinaryIO) -> None:
        self._incoming, self._outgoing = incoming, outgoing
        setup: BodySetup = pickle.loads(self.receive())
        self.tokenizer = setup.tokenizer
        self.model_name = setup.model_name
        self.max_model_len, self.vocab_size = setup.max_model_len, setup.vocab_size

    def tokenizer_of(self, model: str) -> Tokenizer:
        """Return the tokenizer of a model."""
        told = self._ask(model, "companions")
        if told.companions is None:
            raise GivenUp
        return self.tokenizer.of_adapter(told.companions)

    def may_serve(self, model: str) -> bool:
        """Ask whether a model may be served."""
        return bool(self._ask(model, "served").served)

    def receive(self) -> bytes:
        """Return the next message. Raises EOFError when the owner has closed its end."""
        header = self._incoming.read(LENGTH.size)
        if len(header) < LENGTH.size:
            raise EOFError
        return self._incoming.read(LENGTH.unpack(header)[0])

    def send(self, *contents: bytes) -> None:
        """Send messages."""
        for content in contents:
            self._outgoing.write(LENGTH.pack(len(content)))
            self._outgoing.write(content)
        self._outgoing.flush()

    def _ask(self, model: str, about: Literal["served", "companions"]) -> Told:
        self.send(msgspec.msgpack.encode(Question(model, about)))
        return msgspec.msgpack.decode(self.receive(), type=Told)


def answer(path: str, body: bytes, models: ServedModels) -> list[bytes]:
    """Read a body; return the messages that say what came of it."""
    try:
        found = READERS[path](body, models)
    except FORESEEN as error:
        told = as_api_error(error)
        fields = (told.status, told.message, told.param, told.code, told.retry_after_s)
        return [msgspec.msgpack.encode(RefusedBody(*fields))]
    if isinstance(found, bytes):
        return [msgspec.msgpack.encode(ReadResponse()), found]
    head = ReadRequest(replace(found, prompts=()), len(found.prompts))
    return [msgspec.msgpack.encode(head), *map(packed_ids, found.prompts)]


def serve(incoming: BinaryIO, outgoing: BinaryIO) -> None:
    """Read bodies until the other end closes."""
    owner = _Owner(incoming, outgoing)
    while True:
        path, body = owner.receive().decode(), owner.receive()
        try:
            owner.send(*answer(path, body, owner))
        except GivenUp:
            continue
        except (OSError, EOFError):
            raise
        except Exception:  # noqa: BLE001 - it is told to the owner, whose log has it
            owner.send(msgspec.msgpack.encode(BodyFailure(traceback.format_exc())))


def main(descriptor: int) -> None:
    """Serve the socket that has this descriptor."""
    with (
        socket.socket(fileno=descriptor) as end,
        end.makefile("rb") as incoming,
        end.makefile("wb") as outgoing,
    ):
        try:
            serve(incoming, outgoing)
        except (OSError, EOFError):
            return  # the owner has ended


if __name__ == "__main__":
    main(int(sys.argv[1]))
