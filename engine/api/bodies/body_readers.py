"""Read bodies by their path. /tokenize and /detokenize are answered at once, without the engine."""

from collections.abc import Callable, Mapping

import msgspec

from engine.api import schema
from engine.api.errors import refused
from engine.api.parsing import (
    GenerateRequest,
    ServedModels,
    chat_ids,
    chat_request,
    check_model,
    completion_request,
)
from engine.api.tokens.token_parsing import token_request
from engine.api.tools.chat_messages import chat_messages
from engine.api.tools.tool_fields import offered
from scheduler.request import check_token_ids

MOST_TRANSLATED = {"characters": 1 << 20, "tokens": 1 << 18}
"""Characters or token ids that are taken, if no prompt may have more."""


def tokenized(body: bytes, models: ServedModels) -> bytes:
    """Return the response to a body of POST /tokenize. Raises ApiError, UnknownModel or InvalidChat."""
    wire = schema.decoded(body, schema.Tokenize)
    model = wire.model or models.model_name
    check_model(model, models)
    tokenizer = models.tokenizer_of(model)
    if (wire.prompt is None) == (wire.messages is None):
        raise refused("prompt", "give either prompt or messages", "invalid_value")
    if wire.prompt is not None:
        _check_length("prompt", len(wire.prompt), "characters", models)
        tokens = tokenizer.encode(wire.prompt, wire.add_special_tokens is not False)
    else:
        messages = chat_messages(wire.messages or ())
        chars = sum(len(message["content"]) for message in messages)
        _check_length("messages", chars, "characters", models)
        tokens = chat_ids(wire, messages, tokenizer, tools=offered(wire.tools, None))
    found = {"count": len(tokens), "max_model_len": models.max_model_len, "tokens": tokens}
    texts = (
        {"token_strs": [tokenizer.token_text(token) for token in tokens]} if wire.return_token_strs else {}
    )
    return msgspec.json.encode(found | texts)


def detokenized(body: bytes, models: ServedModels) -> bytes:
    """Return the response to a body of POST /detokenize. Raises ApiError, UnknownModel or InvalidParameter."""
    wire = schema.decoded(body, schema.Detokenize)
    check_model(wire.model or models.model_name, models)
    _check_length("tokens", len(wire.tokens), "tokens", models)
    check_token_ids("tokens", wire.tokens, models.vocab_size)
    return msgspec.json.encode({"prompt": models.tokenizer.decode(wire.tokens, skip_special=False)})


def _check_length(field: str, amount: int, unit: str, models: ServedModels) -> None:
    """Raise ApiError for what is too long to be translated: beyond MOST_TRANSLATED, and beyond any prompt."""
    longest = models.max_model_len if unit == "tokens" else models.tokenizer.most_chars(models.max_model_len)
    if amount > (most := max(MOST_TRANSLATED[unit], longest)):
        raise refused(field, f"it has {amount} {unit}, give at most {most}", "invalid_value")


GENERATING: Mapping[str, Callable[[bytes, ServedModels], GenerateRequest]] = {
    "/v1/completions": completion_request,
    "/v1/chat/completions": chat_request,
    "/inference/v1/generate": token_request,
}
"""What reads the bodies of each endpoint that generates, by its path."""

READERS: Mapping[str, Callable[[bytes, ServedModels], GenerateRequest | bytes]] = {
    **GENERATING,
    "/tokenize": tokenized,
    "/detokenize": detokenized,
}
"""What reads each body, by its path: into a request for the engine, or at once into the response's body."""
