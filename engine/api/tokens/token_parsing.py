"""Turn bodies of POST /inference/v1/generate into GenerateRequests: vLLM's shape around the fields of a completion.

What judges the fields of completions judges these too.
"""

from engine.api import schema
from engine.api.parsing import GenerateRequest, ServedModels, check_model, response_form, sampling_params
from engine.tokenizer import PromptTooLong
from scheduler.request import InvalidParameter, check_token_ids

SAMPLING = "sampling_params."
"""What the names of sampling fields begin with, in errors."""


def token_request(body: bytes, client: ServedModels) -> GenerateRequest:
    """Parse a body. Raises ApiError, UnknownModel or InvalidParameter."""
    return from_tokens(schema.decoded(body, schema.TokenGenerate), client)


def from_tokens(wire: schema.TokenGenerate, client: ServedModels) -> GenerateRequest:
    """Check a request against the model that will answer; without `max_tokens` it may fill the model's context.

    Raises ApiError, UnknownModel, PromptTooLong or InvalidParameter.
    """
    model, asked = wire.model or client.model_name, wire.sampling_params
    check_model(model, client)
    fields = {"max_tokens": asked.max_tokens, "logprobs": asked.logprobs}
    try:
        params = sampling_params(asked, fields, client.vocab_size)
    except InvalidParameter as error:
        raise InvalidParameter(SAMPLING + error.field, error.value, error.remedy) from None
    longest = client.max_model_len
    if (count := len(wire.token_ids)) > longest:
        raise PromptTooLong("token_ids", count, "tokens", longest, longest)
    check_token_ids("token_ids", wire.token_ids, client.vocab_size)
    return GenerateRequest(
        model=model,
        prompts=(tuple(wire.token_ids),),
        params=params,
        form=response_form(wire),
        wants_prompt_logprobs=params.prompt_logprobs is not None,
        request_id=wire.request_id,
        priority=wire.priority or 0,
        cache_salt=wire.cache_salt or "",
    )
