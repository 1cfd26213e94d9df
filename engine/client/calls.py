"""Say what each call sends and what its answer means, as values. It may not know how messages travel."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import msgspec
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from engine.catalogue.base import AdapterRecord
from engine.rpc.wire import adapters_pb2, control_pb2, inference_pb2
from scheduler.request import MAX_PRIORITY, InvalidParameter, SamplingParams
from scheduler.structured_outputs import StructuredOutputsParams

R = TypeVar("R")
Ending = Literal["stop", "length", "aborted"]
_INFERENCE, _CONTROL, _ADAPTERS = "/vllm.Inference", "/vllm.Control", "/loraserve.Adapters"
_PAGE = 1000
_ENDINGS: dict[int, Ending] = {
    inference_pb2.FinishInfo.STOP: "stop",
    inference_pb2.FinishInfo.LENGTH: "length",
    inference_pb2.FinishInfo.ABORTED: "aborted",
}


class CallFailed(Exception):
    """A call that the server refused, or that never reached it.

    `code` is gRPC's word, such as `NOT_FOUND`. `retry_after_s` is set where trying again is sensible.
    """

    def __init__(self, code: str, message: str, retry_after_s: float | None, request_id: str | None) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.message = code, message
        self.retry_after_s, self.request_id = retry_after_s, request_id


@dataclass(frozen=True, slots=True)
class GeneratedText:
    """What one sequence, number `index` of its request, was given: all of it, or a part of a stream.

    `ending` is None while more is to come. `stop` is the stop string or the id of the stop token that was met.
    `logprobs` is empty unless asked for, else one for each token. `version` is the answering adapter's: None for the
    base, and in all parts of a stream but the first.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    ending: Ending | None
    stop: str | int | None
    version: str | None = None


@dataclass(frozen=True, slots=True)
class RequestTerms:
    """What a request asks for beside its answer: an id to abort it by, its turn, and with whom it shares K/V.

    Of what waits, the lower `priority` goes first. An empty `cache_salt` is none.
    """

    request_id: str = ""
    priority: int = 0
    cache_salt: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.priority <= MAX_PRIORITY:
            raise InvalidParameter("priority", self.priority, f"give a number from 0 to {MAX_PRIORITY}")


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a server is; a router has no sequences of its own, and tells 0."""

    version: str
    instance_id: str
    max_model_len: int
    max_running_requests: int
    max_batched_tokens: int
    kv_block_size: int
    total_kv_blocks: int


@dataclass(frozen=True, slots=True)
class ClientCall(Generic[R]):
    """One call: its path, what it sends, how its answers are read, and what they mean."""

    path: str
    request: Message
    response: type[Message]
    read: Callable[[Any], R]


def generate(
    prompt: str | Sequence[int], params: SamplingParams, adapter: str | None, terms: RequestTerms
) -> ClientCall[tuple[GeneratedText, ...]]:
    """Ask for whole answers, of every sequence one. Raises InvalidParameter."""
    return _asking("Generate", prompt, params, adapter, terms)


def generate_stream(
    prompt: str | Sequence[int], params: SamplingParams, adapter: str | None, terms: RequestTerms
) -> ClientCall[tuple[GeneratedText, ...]]:
    """Ask for answers in parts. Raises InvalidParameter."""
    return _asking("GenerateStream", prompt, params, adapter, terms)


def abort(request_ids: Sequence[str]) -> ClientCall[None]:
    """Ask to end requests."""
    wire = control_pb2
    return ClientCall(
        f"{_CONTROL}/Abort", wire.AbortRequest(request_ids=request_ids), wire.AbortResponse, _nothing
    )


def server_info() -> ClientCall[ServerInfo]:
    """Ask what the server is."""
    wire = control_pb2
    return ClientCall(f"{_CONTROL}/GetServerInfo", wire.GetServerInfoRequest(), wire.ServerInfo, _server_info)


def list_adapters(after: str) -> ClientCall[tuple[tuple[AdapterRecord, ...], str]]:
    """Ask for a page of adapters, and what to ask for the next one after."""
    wire = adapters_pb2
    request = wire.ListAdaptersRequest(after=after, limit=_PAGE)
    return ClientCall(f"{_ADAPTERS}/List", request, wire.ListAdaptersResponse, _page)


def adapter(name: str) -> ClientCall[AdapterRecord]:
    """Ask what is known of one adapter."""
    return _of_adapter("Get", adapters_pb2.GetAdapterRequest(name=name))


def load_adapter(name: str, source: str | Path, replace: bool) -> ClientCall[AdapterRecord]:
    """Ask the server to register one of its folders."""
    request = adapters_pb2.LoadAdapterRequest(name=name, source=str(source), replace=replace)
    return _of_adapter("Load", request)


def unload_adapter(name: str) -> ClientCall[None]:
    """Ask the server to forget a name."""
    wire = adapters_pb2
    request = wire.UnloadAdapterRequest(name=name)
    return ClientCall(f"{_ADAPTERS}/Unload", request, wire.UnloadAdapterResponse, _nothing)


def pin_adapter(name: str, copies: int) -> ClientCall[AdapterRecord]:
    """Ask for at least so many copies of an adapter; 0 undoes that."""
    if copies == 0:
        return _of_adapter("Unpin", adapters_pb2.UnpinAdapterRequest(name=name))
    return _of_adapter("Pin", adapters_pb2.PinAdapterRequest(name=name, copies=copies))


def _asking(
    method: str, prompt: str | Sequence[int], params: SamplingParams, adapter: str | None, terms: RequestTerms
) -> ClientCall[tuple[GeneratedText, ...]]:
    request = _generate_request(prompt, params, adapter, terms)
    return ClientCall(f"{_INFERENCE}/{method}", request, inference_pb2.GenerateResponse, _texts)


def _generate_request(
    prompt: str | Sequence[int], params: SamplingParams, adapter: str | None, terms: RequestTerms
) -> inference_pb2.GenerateRequest:
    wire = inference_pb2
    if params.max_tokens is None:
        raise InvalidParameter("max_tokens", None, "give a number: gRPC has none for as many as there may be")
    if params.prompt_logprobs is not None:
        raise InvalidParameter(
            "prompt_logprobs", params.prompt_logprobs, "leave it out: this client reads none"
        )
    top = None if params.logprobs is None else wire.CandidateTokens(top_n=params.logprobs)
    request = wire.GenerateRequest(
        request_id=terms.request_id,
        kv=wire.KVCacheParameters(cache_salt=terms.cache_salt) if terms.cache_salt else None,
        priority=terms.priority,
        lora_name=adapter or "",
        temperature=params.temperature,
        sampling=wire.RandomSampling(
            num_sequences=params.n,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            seed=params.seed,
        ),
        decoding=wire.DecodingParameters(
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            repetition_penalty=params.repetition_penalty,
            logit_bias=dict(params.logit_bias),
            **_form(params.structured_outputs),
        ),
        stopping=wire.StoppingCriteria(
            max_new_tokens=params.max_tokens,
            min_new_tokens=params.min_tokens,
            stop_token_ids=params.stop_token_ids,
            stop_strings=params.stop,
            include_stop_strings=params.include_stop_str_in_output,
            ignore_eos=params.ignore_eos,
        ),
        response=wire.ResponseOptions(
            output_token_ids=True,
            output_candidates=top,
            skip_special_tokens=params.skip_special_tokens,
            logprobs_mode=params.logprobs_mode or "",
        ),
    )
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.token_ids.CopyFrom(wire.TokenIds(ids=prompt))
    return request


def _form(asked: StructuredOutputsParams | None) -> dict[str, Any]:
    """Return the field that asks for a form of the text, if one is to be."""
    if asked is None:
        return {}
    if asked.choice is not None:
        return {"choice": inference_pb2.StringChoices(choices=asked.choice)}
    return {asked.form: getattr(asked, asked.form)}


def _texts(response: inference_pb2.GenerateResponse) -> tuple[GeneratedText, ...]:
    version = response.system_fingerprint or None
    return tuple(_text(output, version) for output in (response.outputs, *response.further_outputs))


def _text(output: inference_pb2.SequenceOutput, version: str | None) -> GeneratedText:
    finish = output.finish_info
    reason = finish.WhichOneof("stop_reason")
    return GeneratedText(
        index=output.index,
        text=output.text,
        token_ids=tuple(output.token_ids),
        logprobs=tuple(output.logprobs),
        ending=_ENDINGS.get(finish.finish_reason),
        stop=getattr(finish, reason) if reason in ("stop_token_id", "stop_string") else None,
        version=version,
    )


def _server_info(told: control_pb2.ServerInfo) -> ServerInfo:
    return ServerInfo(
        told.engine_version, told.instance_id, told.max_model_len, told.max_running_requests,
        told.max_batched_tokens, told.kv_block_size, told.total_kv_blocks,
    )  # fmt: skip


def _of_adapter(method: str, request: Message) -> ClientCall[AdapterRecord]:
    return ClientCall(f"{_ADAPTERS}/{method}", request, adapters_pb2.Adapter, _record)


def _page(told: adapters_pb2.ListAdaptersResponse) -> tuple[tuple[AdapterRecord, ...], str]:
    return tuple(map(_record, told.adapters)), told.next


def _record(told: adapters_pb2.Adapter) -> AdapterRecord:
    fields: dict[str, object] = MessageToDict(told, preserving_proto_field_name=True)
    return msgspec.convert(
        {"version": None} | fields, AdapterRecord, strict=False
    )  # numbers of 64 bits are texts


def _nothing(told: Message) -> None:
    return None
