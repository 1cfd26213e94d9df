"""Translate between the wire's messages and the engine's values: the one place that knows vLLM's field names.

A request becomes a completion's body, so that what judges HTTP's fields judges these too.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from engine.api import schema
from engine.api.bodies.tenant_models import TenantModels
from engine.api.errors import refused
from engine.api.parsing import GenerateRequest, from_completion
from engine.errors import UnknownModel
from engine.output import Delta
from engine.rpc.wire import control_pb2, inference_pb2
from scheduler.plan import FinishReason, TokenLogprob
from scheduler.request import InvalidParameter

_DEFAULT_TOKENS = 20  # what the protocol takes max_new_tokens=0 for
_NAMES = {
    "n": "num_sequences",
    "max_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "stop": "stop_strings",
    "model": "lora_name",
    "lora_path": "source_path",
    "user": "session_id",
    "include_stop_str_in_output": "include_stop_strings",
    "logprobs": "output_candidates",
    "prompt_logprobs": "prompt_candidates",
}
_REASONS = {
    FinishReason.STOP: inference_pb2.FinishInfo.STOP,
    FinishReason.LENGTH: inference_pb2.FinishInfo.LENGTH,
    FinishReason.ABORT: inference_pb2.FinishInfo.ABORTED,
}


def field_name(param: str) -> str:
    """Return what the protocol calls a field of HTTP's bodies, or an entry of it as `stop[3]`."""
    name, bracket, entry = param.removeprefix("structured_outputs.").partition("[")
    return _NAMES.get(name, name) + bracket + entry


def read_generate(wire: inference_pb2.GenerateRequest, client: TenantModels) -> GenerateRequest:
    """Check a request against the model that will answer. Raises ApiError, UnknownModel or InvalidParameter.

    Not for the event loop: a long text takes a while.
    """
    completion = schema.converted(_body(wire, _model(wire, client)), schema.Completion)
    try:
        return from_completion(completion, client)
    except InvalidParameter as error:
        raise InvalidParameter(field_name(error.field), error.value, error.remedy) from None


def prompt_info(
    wire: inference_pb2.GenerateRequest, prompt: Sequence[int], first: Delta
) -> inference_pb2.PromptInfo:
    """Write what the first response tells of the prompt."""
    info = inference_pb2.PromptInfo(num_prompt_tokens=len(prompt))
    if wire.response.prompt_token_ids:
        info.token_ids.extend(prompt)
    _write_logprobs(info, first.prompt_logprobs, wire.response.HasField("prompt_candidates"))
    return info


def sequence_output(
    wire: inference_pb2.GenerateRequest, delta: Delta, tokens_so_far: int
) -> inference_pb2.SequenceOutput:
    """Write one Delta; `tokens_so_far` counts its sequence's tokens, the Delta's included."""
    asked = wire.response
    output = inference_pb2.SequenceOutput(index=delta.index, num_tokens=len(delta.token_ids))
    if asked.output_text or not asked.HasField("output_text"):
        output.text = delta.text
    if asked.output_token_ids:
        output.token_ids.extend(delta.token_ids)
    _write_logprobs(output, delta.logprobs, asked.HasField("output_candidates"))
    if delta.finish_reason is not None:
        finish = output.finish_info
        finish.num_output_tokens, finish.finish_reason = tokens_so_far, _REASONS[delta.finish_reason]
        if isinstance(delta.stop_reason, str):
            finish.stop_string = delta.stop_reason
        elif delta.stop_reason is not None:
            finish.stop_token_id = delta.stop_reason
        elif delta.finish_reason is FinishReason.STOP and delta.token_ids:
            finish.eos_token_id = delta.token_ids[-1]
    return output


def lora_adapter(name: str, root: str) -> control_pb2.LoraAdapter:
    """Write an adapter. Its id is made of its name: positive, and the same after a restart."""
    digest = hashlib.sha256(name.encode()).digest()
    return control_pb2.LoraAdapter(
        lora_id=int.from_bytes(digest[:8]) >> 1 | 1, lora_name=name, source_path=root
    )


def _model(wire: inference_pb2.GenerateRequest, client: TenantModels) -> str:
    """Return the adapter, or the base model where none is named; never the base for another's name."""
    if wire.model and wire.model not in client.model_names:
        raise UnknownModel(wire.model)
    if wire.lora_name in client.model_names:
        raise UnknownModel(wire.lora_name)
    return wire.lora_name or wire.model or client.model_name


def _body(wire: inference_pb2.GenerateRequest, model: str) -> dict[str, object]:
    """Write a request as the body of a completion that asks for the same."""
    kind = wire.WhichOneof("prompt")
    if kind is None:
        raise refused("prompt", "give text or token_ids", "invalid_value")
    sampling, decoding, stopping, asked = wire.sampling, wire.decoding, wire.stopping, wire.response
    body: dict[str, object] = {
        "model": model,
        "prompt": wire.text if kind == "text" else list(wire.token_ids.ids),
        "user": wire.session_id,
        "priority": wire.priority,
        "cache_salt": wire.kv.cache_salt or None,
        "temperature": _float(wire.temperature),
        "n": sampling.num_sequences or 1,
        "top_k": sampling.top_k,
        "top_p": _float(sampling.top_p) or 1.0,
        "min_p": _float(sampling.min_p),
        "seed": sampling.seed if sampling.HasField("seed") else None,
        "presence_penalty": _float(decoding.presence_penalty),
        "frequency_penalty": _float(decoding.frequency_penalty),
        "repetition_penalty": _float(decoding.repetition_penalty) or 1.0,
        "logit_bias": {str(token): _float(bias) for token, bias in decoding.logit_bias.items()},
        "max_tokens": stopping.max_new_tokens or _DEFAULT_TOKENS,
        "min_tokens": stopping.min_new_tokens,
        "stop_token_ids": list(stopping.stop_token_ids),
        "stop": list(stopping.stop_strings),
        "include_stop_str_in_output": stopping.include_stop_strings,
        "ignore_eos": stopping.ignore_eos,
        "skip_special_tokens": asked.skip_special_tokens if asked.HasField("skip_special_tokens") else None,
        "logprobs_mode": asked.logprobs_mode or None,
    }
    top = _candidates("output_candidates", asked, asked.output_logprobs)
    prompt_top = _candidates("prompt_candidates", asked, asked.prompt_logprobs)
    form = decoding.WhichOneof("structured_outputs")
    if form is not None:
        value = list(decoding.choice.choices) if form == "choice" else getattr(decoding, form)
        body["structured_outputs"] = {form: value}
    return body | {"logprobs": top, "prompt_logprobs": prompt_top}


def _candidates(name: str, asked: inference_pb2.ResponseOptions, wants_logprobs: bool) -> int | None:
    """Return how many alternatives of each token to tell; None for no probabilities at all."""
    if not asked.HasField(name):  # type: ignore[arg-type]
        return 0 if wants_logprobs else None
    chosen: inference_pb2.CandidateTokens = getattr(asked, name)
    if chosen.WhichOneof("select") != "top_n":
        raise refused(name, "only top_n is supported: give that", "unsupported_value")
    return chosen.top_n


def _write_logprobs(
    into: inference_pb2.PromptInfo | inference_pb2.SequenceOutput,
    scored: Sequence[TokenLogprob],
    candidates: bool,
) -> None:
    for entry in scored:
        into.logprobs.append(entry.logprob)
        into.ranks.append(entry.rank)
        if candidates:
            others = into.candidate_tokens.add().tokens
            for place, (token_id, logprob) in enumerate(entry.top):
                if token_id != entry.token_id:
                    others.add(id=token_id, logprob=logprob, rank=place + 1)


def _float(value: float) -> float:
    """Return the shortest decimal that the wire's 32 bits stand for: 0.7 as HTTP's clients write it."""
    return float(str(np.float32(value)))
