"""LLM: offline generation in the caller's own thread. The same core as the server, without its doors."""

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict, TypeVar, Unpack

from engine.build.assembly import assemble
from engine.config.config import EngineConfig
from engine.core import StepResult
from engine.output import RequestOutput
from engine.tokenizer import Delta, Tokenizer
from lora.adapter import BASE, AdapterRef
from scheduler.plan import FinishReason, TokenEvent, TokenLogprob
from scheduler.request import Request, SamplingParams

T = TypeVar("T")


class EngineOptions(TypedDict, total=False):
    """The fields of EngineConfig that an LLM may be given by name."""

    lora_dir: Path | None
    lora_dtype: str
    device: str
    attention_backend: str
    cuda_graphs: bool
    tensor_parallel_size: int
    quantization: str
    max_model_len: int | None
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    kv_cache_bytes: int | None
    adapter_bytes: int | None
    adapter_patience_s: float
    shared_memory: str
    adapter_cache_dir: Path | None
    progress: bool


@dataclass(frozen=True, slots=True)
class Output:
    """One of a request's `n` answers. `logprobs` is empty unless asked for."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Result:
    """A prompt's answers. `token_times_s` are seconds from submission to each token of output 0."""

    prompt_token_ids: tuple[int, ...]
    outputs: tuple[Output, ...]
    prompt_logprobs: tuple[TokenLogprob, ...]
    cached_tokens: int
    token_times_s: tuple[float, ...]


class _Run:
    """One request on its way to a Result: what came of each sequence so far, and when."""

    def __init__(self, request: Request, codec: Tokenizer) -> None:
        self.answer = RequestOutput(request, codec)
        self._deltas: list[list[Delta]] = [[] for _ in range(request.params.n)]
        self._token_times_s: list[float] = []

    def push(self, event: TokenEvent, now_s: float) -> Delta | None:
        delta = self.answer.push(event)
        if delta is not None:
            self._deltas[delta.index].append(delta)
            if delta.index == 0 and delta.token_ids:
                self._token_times_s.append(now_s - self.answer.request.arrival_s)
        return delta

    def result(self) -> Result:
        return Result(
            prompt_token_ids=self.answer.request.prompt_token_ids,
            outputs=tuple(_output(index, deltas) for index, deltas in enumerate(self._deltas)),
            prompt_logprobs=self._deltas[0][0].prompt_logprobs,
            cached_tokens=self.answer.cached_tokens,
            token_times_s=tuple(self._token_times_s),
        )


class LLM:
    """A base model and its adapters, for batch generation.

    >>> llm = LLM()                                      # the embedded demo model, with its adapters
    >>> llm.chat([[{"role": "user", "content": "garden"}]], SamplingParams(temperature=0), adapters="reverse")

    `model` is a folder or hub id, None the embedded demo model; `loras` maps names to PEFT folders; further
    options are EngineConfig's fields. Not thread-safe. Raises what assembling raises (UnsupportedModel,
    AdapterRefused, InvalidConfig, ...).
    """

    def __init__(
        self,
        model: str | Path | None = None,
        loras: Mapping[str, str | Path] | None = None,
        dtype: str = "auto",
        **options: Unpack[EngineOptions],
    ) -> None:
        pairs = tuple((name, Path(folder)) for name, folder in (loras or {}).items())
        named = EngineConfig(model=str(model) if model else None, loras=pairs, dtype=dtype, progress=False)
        self.engine = assemble(replace(named, **options))
        self._seeds = random.Random()
        self._submitted = 0

    @property
    def codec(self) -> Tokenizer:
        """The model's tokenizer and chat template."""
        return self.engine.codec

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        adapters: str | Sequence[str | None] | None = None,
    ) -> list[Result]:
        """Answer every prompt (text or token ids); results come in the prompts' order.

        `params` and `adapters` are one for all or one per prompt; adapter None is the base. Raises
        UnknownAdapter or a ValueError that names the field before anything runs, EngineError if the engine
        gives up; either way nothing of the call is left behind.
        """
        if isinstance(prompts, str):
            raise ValueError("prompts is one string: give a list of prompts")
        count = len(prompts)
        each_params = _spread("params", params or SamplingParams(), SamplingParams, count)
        each_adapter = _spread("adapters", adapters, (str, type(None)), count)
        refs = {name: self._resolve(name) for name in dict.fromkeys(each_adapter)}
        runs: dict[str, _Run] = {}
        try:
            for prompt, param, name in zip(prompts, each_params, each_adapter, strict=True):
                request = self._request(prompt, param, refs[name])
                self.engine.core.submit(request)
                runs[request.request_id] = _Run(request, self.codec)
            self._finish(runs)
        finally:
            for request_id in runs:
                self.engine.core.abort(request_id)
        return [run.result() for run in runs.values()]

    def chat(
        self,
        conversations: Sequence[Sequence[Mapping[str, str]]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        adapters: str | Sequence[str | None] | None = None,
    ) -> list[Result]:
        """Answer every conversation, a list of messages ({"role", "content"}) that the model's chat template turns
        into a prompt; the rest as `generate`. Raises InvalidChat where there is no template or it refuses them.
        """
        if any(isinstance(message, str) for conversation in conversations for message in conversation):
            raise ValueError("conversations is one conversation: give a list of lists of messages")
        return self.generate([self.codec.encode_chat(each) for each in conversations], params, adapters)

    def close(self) -> None:
        """Stop the adapter loader's threads and the other devices' processes."""
        self.engine.core.settle()
        self.engine.close()

    def _resolve(self, name: str | None) -> AdapterRef:
        return BASE if name is None else self.engine.store.resolve(name)

    def _request(self, prompt: str | Sequence[int], params: SamplingParams, adapter: AdapterRef) -> Request:
        token_ids = self.codec.encode(prompt) if isinstance(prompt, str) else tuple(prompt)
        self.engine.card.check_token_ids(token_ids)
        if params.seed is None:
            params = replace(params, seed=self._seeds.getrandbits(63))
        self._submitted += 1
        eos, now_s = self.engine.card.eos_token_ids, time.monotonic()
        return Request(f"offline-{self._submitted}", token_ids, adapter, params, eos, now_s)

    def _finish(self, runs: dict[str, _Run]) -> None:
        pending = len(runs)
        while pending:
            result = self.engine.core.step()
            pending -= self._deliver(runs, result)
            if result.idle:
                self.engine.wait_ready()

    def _deliver(self, runs: dict[str, _Run], result: StepResult) -> int:
        """Hand a step's events to their requests; how many requests ended."""
        if result.failures:
            raise result.failures[0].error
        now_s, ended = time.monotonic(), 0
        for event in result.events:
            run = runs[event.key.request_id]
            delta = run.push(event, now_s)
            if delta is None or delta.finish_reason is None:
                continue
            if event.finish_reason is None:
                self.engine.core.finish(event.key)
            ended += not run.answer.open
        return ended


def _output(index: int, deltas: list[Delta]) -> Output:
    reason = deltas[-1].finish_reason
    assert reason is not None, "a sequence's last delta says why it ended"
    return Output(
        index=index,
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        finish_reason=reason,
        logprobs=tuple(entry for delta in deltas for entry in delta.logprobs),
    )


def _spread(field: str, given: T | Sequence[T], one: type | tuple[type, ...], count: int) -> list[T]:
    """One value for each of `count` prompts, from one for all or a sequence of as many."""
    if isinstance(given, one):
        return [given] * count  # pyright: ignore[reportReturnType]
    values = list(given)  # pyright: ignore[reportArgumentType]
    if len(values) != count:
        raise ValueError(f"{field} has {len(values)} entries for {count} prompts: give one, or one for each")
    return values
