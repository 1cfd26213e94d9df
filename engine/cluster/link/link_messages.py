"""Define what a router and a node may say to each other, and how it looks on the wire.

Each message is MessagePack of one tagged Struct, never pickle. msgspec refuses whatever is not exactly one message,
and the values' own checks refuse what no request may have.
"""

from typing import Annotated, Literal

import msgspec

from lora.adapter import BASE, AdapterRef
from scheduler.cluster.routing.base import NodeLoad
from scheduler.plan import FinishReason, TokenLogprob
from scheduler.request import MOST_SALT_CHARS, SamplingParams

SERVICE, METHOD = "loraserve.Link", "Open"
VERSION = 4
FailureKind = Literal["busy", "late", "adapter", "request", "step", "structure", "stopped"]
"""Why a node gives a request up. It has no room now, or its first token is overdue; its adapter cannot be had; it can
never run; its own part of a step failed; its text cannot take the form that was asked for; or the engine has
stopped."""
Key = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
Small = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
Trace = Annotated[str, msgspec.Meta(max_length=64)]
Salt = Annotated[str, msgspec.Meta(max_length=MOST_SALT_CHARS)]
TokenId = Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]


class LinkError(Exception):
    """A message that is none; the stream it came on is closed."""


class _LinkMessage(
    msgspec.Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True, gc=False
):
    """What all messages have in common: the class's name stands first, and no field is unknown."""


class OpenLink(_LinkMessage, frozen=True):
    """First from a router: who it is. `start` are the milliseconds at which its process began."""

    version: Small
    router: Name
    start: Small


class Submit(_LinkMessage, frozen=True):
    """Run a request, which the router calls `key`; it is the `number`-th that it sends there.

    The fields are those of scheduler.request.Request; `first_token_in_s` is from now on, and the first of its sequences
    draws by `stream`. `trace` is the router's span of it, as W3C's traceparent; empty if nobody traces it.
    """

    key: Key
    number: Small
    adapter: AdapterRef | None
    prompt_token_ids: tuple[TokenId, ...]
    params: SamplingParams
    eos_token_ids: tuple[int, ...]
    priority: int = 0
    tenant: str = ""
    first_token_in_s: float | None = None
    drawn_token_ids: tuple[TokenId, ...] = ()
    stream: Small = 0
    trace: Trace = ""
    cache_salt: Salt = ""

    @property
    def ref(self) -> AdapterRef:
        """Return the adapter; the base is None on the wire."""
        return self.adapter or BASE


class Finish(_LinkMessage, frozen=True):
    """End one sequence: its text is complete."""

    key: Key
    index: Small


class Abort(_LinkMessage, frozen=True):
    """End a request that nobody waits for."""

    key: Key


class NodeReady(_LinkMessage, frozen=True):
    """First from a node: what it serves. `weights` is the digest of the base model's."""

    version: Small
    node: Name
    session: Small
    max_model_len: Small
    vocab_size: Small
    eos_token_ids: tuple[int, ...]
    weights: str


class LoadTold(_LinkMessage, frozen=True):
    """What a node's load is."""

    load: NodeLoad


class TokenTold(_LinkMessage, frozen=True):
    """A TokenEvent of a request by its key."""

    key: Key
    index: Small
    token_id: TokenId | None
    finish_reason: FinishReason | None = None
    logprob: TokenLogprob | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    cached_tokens: Small = 0


class Tokens(_LinkMessage, frozen=True):
    """What one step drew for this router."""

    events: tuple[TokenTold, ...]


class RequestFailed(_LinkMessage, frozen=True):
    """A request that the node gave up, and why."""

    key: Key
    kind: FailureKind
    reason: str


FromRouter = OpenLink | Submit | Finish | Abort
FromNode = NodeReady | LoadTold | Tokens | RequestFailed
_encoder = msgspec.msgpack.Encoder()
_from_router: msgspec.msgpack.Decoder[FromRouter] = msgspec.msgpack.Decoder(FromRouter)
_from_node: msgspec.msgpack.Decoder[FromNode] = msgspec.msgpack.Decoder(FromNode)


def encoded(message: FromRouter | FromNode) -> bytes:
    """Return a message's bytes."""
    return _encoder.encode(message)


def read_from_router(content: bytes) -> FromRouter:
    """Read a router's message. Raises LinkError."""
    try:
        return _from_router.decode(content)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise LinkError(f"no message of a router: {error}") from error


def read_from_node(content: bytes) -> FromNode:
    """Read a node's message. Raises LinkError."""
    try:
        return _from_node.decode(content)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise LinkError(f"no message of a node: {error}") from error
