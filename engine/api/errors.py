"""Turn refusals and failures into OpenAI's error objects and HTTP statuses."""

from http import HTTPStatus

import msgspec

from engine.errors import (
    AdapterBusy,
    AdapterExists,
    AdapterFailed,
    AdapterHeld,
    AskRouter,
    BeyondLimit,
    Draining,
    EngineError,
    EngineStopped,
    InvalidAdapter,
    InvalidAdapterName,
    NotAdmitted,
    NotInTime,
    Overloaded,
    PeersSilent,
    RateLimited,
    StructureFailed,
    TooManySequences,
    UnknownModel,
)
from engine.text.template_renderer import InvalidChat
from engine.tokenizer import PromptTooLong
from scheduler.request import InvalidParameter

_MAX_SHOWN_CHARS = 100  # of a value at fault
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A response other than success. `param` is the request's field at fault, `code` OpenAI's word for it."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int = 0,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, object]:
        """Return OpenAI's error object; halves of surrogate pairs, which no encoding has, are spelt out."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        message, param = _encodable(self.message), self.param and _encodable(self.param)
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """The headers that go with the status."""
        return {"Retry-After": str(self.retry_after_s)} if self.retry_after_s else {}


FORESEEN = (ApiError, EngineError, InvalidParameter)
"""Errors whose own message says what a client should know."""


def refused(param: str, message: str, code: str | None = None) -> ApiError:
    """Make the 400 for a field whose value cannot be honoured."""
    return ApiError(HTTPStatus.BAD_REQUEST, f"{param}: {message}", param, code)


def _shown(value: object) -> str:
    """Write a value as JSON, as the client did; a long one is cut short."""
    try:
        text = msgspec.json.encode(value).decode()
    except (TypeError, ValueError, OverflowError):
        text = repr(value)
    return text if len(text) <= _MAX_SHOWN_CHARS else text[: _MAX_SHOWN_CHARS - 1] + "…"


def _encodable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


def as_api_error(error: Exception) -> ApiError:
    """Express `error` for a client; of what nobody foresaw, say only that it happened."""
    match error:
        case ApiError():
            return error
        case InvalidParameter():
            return refused(
                error.field, f"{_shown(error.value)} is not accepted: {error.remedy}", "invalid_value"
            )
        case InvalidChat():
            return ApiError(HTTPStatus.BAD_REQUEST, str(error), "messages", "invalid_value")
        case PromptTooLong():
            return ApiError(HTTPStatus.BAD_REQUEST, str(error), error.field, "context_length_exceeded")
        case InvalidAdapterName():
            return ApiError(HTTPStatus.BAD_REQUEST, str(error), "lora_name", "invalid_value")
        case AdapterExists():
            return refused("lora_name", str(error), "adapter_exists")
        case InvalidAdapter():
            return ApiError(HTTPStatus.BAD_REQUEST, str(error), "model", "invalid_adapter")
        case UnknownModel():
            return ApiError(HTTPStatus.NOT_FOUND, str(error), "model", "model_not_found")
        case TooManySequences():
            return ApiError(HTTPStatus.BAD_REQUEST, str(error), "n", "too_many_sequences")
        case Overloaded():
            return ApiError(429, str(error), None, "overloaded", max(1, error.retry_after_s))
        case RateLimited():
            return ApiError(429, str(error), None, "rate_limit_exceeded", error.retry_after_s)
        case BeyondLimit():
            return ApiError(HTTPStatus.BAD_REQUEST, str(error), None, "beyond_limit")
        case AskRouter():
            return ApiError(HTTPStatus.FORBIDDEN, str(error), None, "ask_a_router")
        case AdapterBusy():
            return ApiError(429, str(error), "model", "adapter_busy", error.retry_after_s)
        case AdapterHeld():
            return ApiError(503, str(error), "model", "adapter_held", error.retry_after_s)
        case NotAdmitted():
            return ApiError(429, str(error), None, "overloaded", max(1, error.retry_after_s))
        case Draining():
            return ApiError(503, str(error), None, "shutting_down", retry_after_s=1)
        case EngineStopped():
            return ApiError(503, str(error), None, "engine_stopped", retry_after_s=5)
        case NotInTime():
            return ApiError(503, str(error), None, "busy", max(1, error.retry_after_s))
        case PeersSilent():
            return ApiError(503, str(error), "model", "peers_silent", retry_after_s=2)
        case AdapterFailed():
            return ApiError(503, str(error), "model", "adapter_unavailable", retry_after_s=5)
        case StructureFailed():
            return ApiError(HTTPStatus.BAD_REQUEST, str(error), "structured_outputs", "structure_failed")
        case EngineError():
            return ApiError(500, str(error), None, "engine_error")
        case _:
            return ApiError(500, "the server failed; its log has the cause", None, "internal_error")
