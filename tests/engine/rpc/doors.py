"""The same request through each door: HTTP, gRPC whole and in parts, and `LLM`."""

import asyncio
import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import grpc

from engine import LLM, SamplingParams
from engine.assembly.assembly import assemble
from engine.async_engine import AsyncEngine
from engine.config.config import EngineConfig, ServeConfig
from engine.metrics.telemetry import Telemetry
from engine.rpc.wire import inference_pb2
from engine.tokenizer import PromptTooLong
from lora.errors import UnknownAdapter
from tests.engine.rpc.door import Ask, served

_START_S = 120
_GRPC_NAMES = {
    "n": ("sampling", "num_sequences"),
    "max_tokens": ("stopping", "max_new_tokens"),
    "min_tokens": ("stopping", "min_new_tokens"),
    "stop": ("stopping", "stop_strings"),
    "include_stop_str_in_output": ("stopping", "include_stop_strings"),
    **{name: ("sampling", name) for name in ("top_k", "top_p", "min_p", "seed")},
    **{
        name: ("decoding", name)
        for name in ("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias")
    },
    **{name: ("stopping", name) for name in ("stop_token_ids", "ignore_eos")},
    **{name: ("response", name) for name in ("skip_special_tokens", "logprobs_mode")},
}
_REASONS = {inference_pb2.FinishInfo.STOP: "stop", inference_pb2.FinishInfo.LENGTH: "length"}


@dataclass(frozen=True)
class Case:
    """A prompt, who is to answer it (None: the base), and SamplingParams' fields."""

    prompt: str | Sequence[int] = "garden"
    adapter: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Answer:
    """One sequence. `top` are, for each token, the likeliest others."""

    text: str
    token_ids: tuple[int, ...]
    reason: str
    logprobs: tuple[float, ...]
    top: tuple[frozenset[int], ...]
    prompt_logprobs: tuple[float, ...]
    prompt_tokens: int


@dataclass(frozen=True)
class Refused:
    """A refusal: of whom it names, and in which words."""

    code: str
    words: str


class Doors:
    """A server's two addresses, and an LLM of the same model."""

    def __init__(self, http: str, channel: grpc.Channel, llm: LLM) -> None:
        self._http, self._channel, self._llm = http, channel, llm

    def ask(self, door: str, case: Case) -> list[Answer] | Refused:
        """Ask through a door: `http`, `grpc`, `grpc stream` or `llm`."""
        return {"http": self._by_http, "llm": self._by_llm}.get(door, self._by_grpc)(case, "stream" in door)

    def _by_http(self, case: Case, streams: bool) -> list[Answer] | Refused:
        params = {"temperature": 0, "max_tokens": 16, **case.params}
        ids = {"return_token_ids": True, "return_tokens_as_token_ids": True}
        body = {"model": case.adapter or "demo", "prompt": case.prompt, **ids, **params}
        request = Request(
            f"{self._http}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urlopen(request, timeout=60) as response:
                told = json.load(response)
        except HTTPError as error:
            with error:
                return Refused(str(error.code), json.load(error)["error"]["message"])
        return [_of_choice(choice, told["usage"]["prompt_tokens"]) for choice in told["choices"]]

    def _by_grpc(self, case: Case, streams: bool) -> list[Answer] | Refused:
        sent = _grpc_request(case).SerializeToString()
        name = "/vllm.Inference/GenerateStream" if streams else "/vllm.Inference/Generate"
        try:
            if streams:
                parts = list(self._channel.unary_stream(name)(sent, timeout=60))
            else:
                parts = [self._channel.unary_unary(name)(sent, timeout=60)]
        except grpc.RpcError as error:
            return Refused(error.code().name, error.details())
        responses = [inference_pb2.GenerateResponse.FromString(part) for part in parts]
        outputs = [each for part in responses for each in (part.outputs, *part.further_outputs)]
        prompt = responses[0].prompt_info
        return [
            _joined([each for each in outputs if each.index == index], prompt)
            for index in range(1 + max(each.index for each in outputs))
        ]

    def _by_llm(self, case: Case, streams: bool) -> list[Answer] | Refused:
        params = {"temperature": 0, "max_tokens": 16, **case.params}
        prompt: Any = case.prompt
        if not isinstance(prompt, str):
            prompt = {"prompt_token_ids": list(prompt)}
        try:
            (result,) = self._llm.generate([prompt], SamplingParams(**params), adapters=case.adapter)
        except (ValueError, PromptTooLong, UnknownAdapter) as error:
            return Refused(type(error).__name__, str(error))
        return [
            Answer(
                output.text,
                output.token_ids,
                output.finish_reason.value,
                tuple(each.logprob for each in output.logprobs),
                tuple(_others(each.token_id, (token for token, _ in each.top)) for each in output.logprobs),
                tuple(each.logprob for each in result.prompt_logprobs),
                len(result.prompt_token_ids),
            )
            for output in result.outputs
        ]


def _grpc_request(case: Case) -> Ask:
    ask = Ask(lora_name=case.adapter or "", response={"output_token_ids": True})
    if isinstance(case.prompt, str):
        ask.text = case.prompt
    else:
        ask.token_ids.SetInParent()
        ask.token_ids.ids.extend(case.prompt)
    for name, value in {"max_tokens": 16, **case.params}.items():
        if name == "temperature":
            ask.temperature = value
        elif name in ("logprobs", "prompt_logprobs"):
            place = "output_candidates" if name == "logprobs" else "prompt_candidates"
            getattr(ask.response, place).top_n = value
        else:
            group, wire = _GRPC_NAMES[name]
            given = [value] if wire == "stop_strings" and isinstance(value, str) else value
            ask.MergeFrom(Ask(**{group: {wire: given}}))
    return ask


def _others(token_id: int, likeliest: Iterable[int]) -> frozenset[int]:
    return frozenset(likeliest) - {token_id}


def _of_choice(choice: dict[str, Any], prompt_tokens: int) -> Answer:
    """Read a choice of a completion, whose tokens are written as `token_id:5`."""
    scored = choice["logprobs"] or {"token_logprobs": [], "top_logprobs": []}
    tops = [[int(token.partition(":")[2]) for token in top] for top in scored["top_logprobs"] or []]
    # The first token has none.
    prompt = list(zip(choice["prompt_token_ids"], choice.get("prompt_logprobs") or [], strict=False))[1:]
    return Answer(
        choice["text"],
        tuple(choice["token_ids"]),
        choice["finish_reason"],
        tuple(scored["token_logprobs"]),
        tuple(_others(token, top) for token, top in zip(choice["token_ids"], tops, strict=False)),
        tuple(entry[str(token_id)]["logprob"] for token_id, entry in prompt),
        prompt_tokens,
    )


def _joined(parts: Sequence[inference_pb2.SequenceOutput], prompt: inference_pb2.PromptInfo) -> Answer:
    candidates = [each for part in parts for each in part.candidate_tokens]
    token_ids = tuple(token for part in parts for token in part.token_ids)
    return Answer(
        "".join(part.text for part in parts),
        token_ids,
        _REASONS[parts[-1].finish_info.finish_reason],
        tuple(value for part in parts for value in part.logprobs),
        tuple(
            _others(token, (other.id for other in each.tokens))
            for token, each in zip(token_ids, candidates, strict=False)
        ),
        tuple(prompt.logprobs),
        prompt.num_prompt_tokens,
    )


@contextmanager
def opened(llm: LLM) -> Iterator[Doors]:
    """Serve the embedded model beside `llm`, in a thread with an event loop of its own."""
    told: list[str] = []
    ready, stop = threading.Event(), threading.Event()

    async def run() -> None:
        options: Any = {"max_model_len": 128, "kv_cache_bytes": 8 << 20, "progress": False}
        engine = AsyncEngine(assemble(EngineConfig(**options)), Telemetry(), 256)
        async with served(engine, ServeConfig()) as (_, address, http, _stop):
            told.extend((http, address))
            ready.set()
            while not stop.is_set():
                await asyncio.sleep(0.05)

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    try:
        assert ready.wait(_START_S), "the server did not start"
        http, address = told
        with grpc.insecure_channel(address) as channel:
            yield Doors(http, channel, llm)
    finally:
        stop.set()
        thread.join()
