"""Read the messages of calls strictly: what is not declared is refused by its name, and never passed over."""

from collections.abc import Mapping
from typing import Any, TypeVar, cast

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from engine.api.errors import ApiError, refused

_UNSUPPORTED: Mapping[tuple[str, int], str] = {
    ("GenerateRequest", 11): "truncate_prompt_tokens",
    ("GenerateRequest", 14): "media",
    ("KVCacheParameters", 1): "bypass_prefix_cache",
    ("KVCacheParameters", 3): "kv_transfer_params",
    ("KVCacheParameters", 4): "ec_transfer_params",
    ("DecodingParameters", 5): "allowed_token_ids",
    ("DecodingParameters", 11): "structural_tag",
}
"""What vLLM's clients may send and the declarations lack, by message and number."""

AnyMessage = TypeVar("AnyMessage", bound=Message)


def read_message(kind: type[AnyMessage], sent: bytes) -> AnyMessage:
    """Read what a client sent. Raises ApiError for what is no such message, or holds more than is declared."""
    try:
        message = kind.FromString(sent)
    except DecodeError:
        reason = f"what was sent is no {kind.DESCRIPTOR.name}: send one as the declarations say"
        raise ApiError(400, reason, None, "invalid_message") from None
    _refuse_undeclared(message)
    return message


def _refuse_undeclared(message: Message) -> None:
    """Refuse fields that are not declared, at any depth, unless they are empty messages, texts or numbers."""
    kind = message.DESCRIPTOR.name
    for found in UnknownFieldSet(message):
        if found.data:
            name = _UNSUPPORTED.get((kind, found.field_number), f"field {found.field_number} of {kind}")
            raise refused(name, "it is not supported: leave it out", "unsupported_value")
    for field, value in cast(list[tuple[FieldDescriptor, Any]], message.ListFields()):
        if field.message_type is not None and not field.message_type.GetOptions().map_entry:
            for part in value if field.is_repeated else (value,):
                _refuse_undeclared(part)
