"""Define what the process that reads large bodies and its owner say to each other, as MessagePack.

The owner sends a BodySetup once, pickled, and for each body its path and its bytes. The process asks what only the
owner knows, any number of times, and then gives an answer. Nothing that comes from it is unpickled: it has read what a
stranger wrote.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from engine.api.parsing import GenerateRequest
from engine.tokenizer import Tokenizer
from lora.format.companions import Companions

_PIECE_IDS = 1 << 16  # token ids that are turned into integers at once, while no other thread runs


@dataclass(frozen=True, slots=True)
class BodySetup:
    """What does not change while a server runs. See `engine.api.base.ServedModels`."""

    tokenizer: Tokenizer
    model_name: str
    max_model_len: int
    vocab_size: int


class Question(msgspec.Struct, frozen=True, tag=True):
    """Whether a model may be served, or what is special about its tokenizer."""

    model: str
    about: Literal["served", "companions"]


class Told(msgspec.Struct, frozen=True):
    """The answer to a Question; without either the body is given up, by the error that the owner has."""

    served: bool | None = None
    companions: Companions | None = None


class ReadRequest(msgspec.Struct, frozen=True, tag=True):
    """What is to be generated; `count` messages with the token ids of a prompt each follow."""

    request: GenerateRequest
    count: int


class ReadResponse(msgspec.Struct, frozen=True, tag=True):
    """The response to a body that asks for nothing of the engine follows, as one message."""


class RefusedBody(msgspec.Struct, frozen=True, tag=True):
    """Why a body is refused: the fields of an ApiError."""

    status: int
    message: str
    param: str | None
    code: str | None
    retry_after_s: int


class BodyFailure(msgspec.Struct, frozen=True, tag=True):
    """A failure that nobody foresaw, with its traceback."""

    traceback: str


Message = Question | ReadRequest | ReadResponse | RefusedBody | BodyFailure


def packed_ids(token_ids: Sequence[int]) -> bytes:
    """Write token ids as 4 bytes each, in this machine's order."""
    return array("i", token_ids).tobytes()


def unpacked_ids(content: bytes) -> tuple[int, ...]:
    """Read what `packed_ids` wrote; other threads go on meanwhile."""
    packed = memoryview(content).cast("i")
    found: list[int] = []
    for start in range(0, len(packed), _PIECE_IDS):
        found += packed[start : start + _PIECE_IDS]
    return tuple(found)
