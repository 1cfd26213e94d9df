"""Try bytes on readers that need neither a server nor a folder: of requests, batch lines and control messages."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from engine.api import parsing
from engine.api.errors import as_api_error
from engine.api.schema import decoded
from engine.api.tokens.token_parsing import token_request
from engine.assembly.assembly import assemble
from engine.async_engine import AsyncEngine
from engine.batches.batch_lines import BrokenLine, read_line
from engine.metrics.telemetry import Telemetry
from scripts.fuzz.case import Case, Finding
from scripts.fuzz.harnesses.bodies import BODIES
from scripts.fuzz.live_node import ENGINE
from scripts.fuzz.mutators import spoilt_json
from transport.base import RemoteRegion
from transport.control import messages
from transport.errors import WireError

_PARSERS: Mapping[str, Callable[[bytes, AsyncEngine], object]] = {
    "/v1/completions": parsing.completion_request,
    "/v1/chat/completions": parsing.chat_request,
    "/inference/v1/generate": token_request,
}
_LINE, _MESSAGE = "batch line", "message"
_MESSAGES: Sequence[messages.Message] = (
    messages.Hello(messages.VERSION, "a", "nonce"),
    messages.Challenge(messages.VERSION, "a", "nonce", "proof"),
    messages.Welcome({"stream": "", "ucx": "a"}),
    messages.LeaseRequest("adapter", 1.5, "stream"),
    messages.Grant(1, 2.0, "", (RemoteRegion("a", 1, 4096, 64, -1, 7),)),
    messages.Bytes(64),
    messages.ReleaseLease(read=True, confirm=False),
    messages.Refusal("LeaseExpired", "ask again"),
)


@dataclass(frozen=True, slots=True)
class Reader:
    """What reads one kind of input and says in a word what came of it, inputs that it takes, and further fields."""

    read: Callable[[bytes], str]
    whole: Sequence[bytes]
    keys: Sequence[str] = ()


class ReadersTarget:
    """Readers of JSON, each by the head of its cases."""

    def __init__(self, readers: Mapping[str, Reader]) -> None:
        """Try these readers."""
        self._readers = readers

    def whole(self) -> list[Case]:
        """Return inputs that are taken."""
        return [Case(head, content) for head, reader in self._readers.items() for content in reader.whole]

    def draw(self, chance: random.Random) -> Case:
        """Draw a reader and a spoilt input for it."""
        head = chance.choice(list(self._readers))
        reader = self._readers[head]
        value = msgspec.json.decode(chance.choice(reader.whole))
        return Case(head, spoilt_json(chance, value, reader.keys))

    def run(self, case: Case) -> str:
        """Read the input."""
        return self._readers[case.head].read(case.content)

    def check(self) -> None:
        """Nothing is left behind."""

    def close(self) -> None:
        """Nothing was started."""


def requests() -> ReadersTarget:
    """Return the target of all bodies and batch lines, decoded and checked against a model that never runs."""
    client = AsyncEngine(assemble(ENGINE), Telemetry(), 256)
    readers: dict[str, Reader] = {}
    lines: list[bytes] = []
    for path, (kind, bodies) in BODIES.items():

        def read(content: bytes, path: str = path, kind: type[msgspec.Struct] = kind) -> object:
            parse = _PARSERS.get(path)
            return decoded(content, kind) if parse is None else parse(content, client)

        keys = [field.encode_name for field in msgspec.structs.fields(kind)]
        readers[path] = Reader(_told(read), [msgspec.json.encode(body) for body in bodies], keys)
        line = {"custom_id": "a", "method": "POST", "url": path}
        lines += [msgspec.json.encode(line | {"body": body}) for body in bodies if path in _PARSERS]
    return ReadersTarget({**readers, _LINE: Reader(_told(_read_line), lines, ("metadata",))})


def control_messages() -> ReadersTarget:
    """Return the target of what nodes send each other over the control connection."""
    whole = [messages.encode(message)[messages.LENGTH.size :] for message in _MESSAGES]
    return ReadersTarget({_MESSAGE: Reader(_read_message, whole, ("kind", "x"))})


def _told(read: Callable[[bytes], object]) -> Callable[[bytes], str]:
    """Return a reader that gives the status of a refusal that a client is told, and raises what nobody foresaw."""

    def reading(content: bytes) -> str:
        try:
            read(content)
        except Exception as error:
            told = as_api_error(error)
            if told.status >= 500:
                raise
            msgspec.json.encode(told.body())  # it is sent on
            return str(told.status)
        return "taken"

    return reading


def _read_line(content: bytes) -> object:
    line = read_line(content)
    if isinstance(line, BrokenLine):
        raise line.error
    return line.endpoint


def _read_message(content: bytes) -> str:
    try:
        message = messages.decode(content)
    except WireError as error:
        str(error).encode()  # it is logged, and sent on
        return "refused"
    if messages.decode(messages.encode(message)[messages.LENGTH.size :]) != message:
        raise Finding(f"it is read otherwise when it is sent on: {message}")
    return "taken"
