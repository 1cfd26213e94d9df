"""Generate offline, in the caller's own thread: the server's core and its rule for messages, without HTTP."""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Concatenate, ParamSpec, cast

import msgspec

from engine.api.parsing import chat_messages
from engine.api.schema import Message
from engine.assembly.assembly import assemble
from engine.config.config import EngineConfig
from engine.config.option import from_python
from engine.core import StepResult
from engine.output import Delta, RequestOutput, join_deltas
from engine.text.template_renderer import InvalidChat
from engine.tokenizer import Tokenizer
from lora.adapter import BASE, AdapterRef
from scheduler.plan import FinishReason, TokenLogprob
from scheduler.request import InvalidParameter, Request, SamplingParams, as_integers

P = ParamSpec("P")
Prompt = str | Sequence[int] | Mapping[str, object]
_PROMPT_KEYS = ("prompt", "prompt_token_ids")


def _like(
    config: Callable[P, EngineConfig],
) -> Callable[[Callable[..., None]], Callable[Concatenate[Any, P], None]]:
    """Give a constructor the parameters of `config`, for type checkers: the fields are declared there alone."""

    def same(constructor: Callable[..., None]) -> Callable[Concatenate[Any, P], None]:
        return constructor

    return same


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


class LLM:
    """A base model and its adapters, for batch generation.

    >>> llm = LLM()                                      # the embedded demo model, with its adapters
    >>> llm.chat([[{"role": "user", "content": "garden"}]], SamplingParams(temperature=0), adapters="reverse")

    It takes EngineConfig's fields, of which docs/options.md tells: `model` is a folder or hub id, `loras` maps names to
    PEFT folders. Not thread-safe. Raises what assembling raises (UnsupportedModel, AdapterRefused, InvalidConfig, ...).
    """

    @_like(EngineConfig)
    def __init__(self, *arguments: Any, **options: Any) -> None:
        """Load the model and its adapters; progress is shown only if asked for."""
        config = from_python(EngineConfig, arguments, {"progress": False, **options})
        self.engine = assemble(config)
        self._seeds = random.Random()
        self._submitted = 0

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer and chat template."""
        return self.engine.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        adapters: str | Sequence[str | None] | None = None,
    ) -> list[Result]:
        """Answer every prompt: text, token ids, or a dict of one of them as `prompt` or `prompt_token_ids`.

        Results come in the prompts' order. A text or a dict alone is a list of one.

        `params` and `adapters` are one for all or one per prompt; adapter None is the base. Raises
        UnknownAdapter or a ValueError that names the field before anything runs, EngineError if the engine
        gives up; either way nothing of the call is left behind.
        """
        if isinstance(prompts, str | Mapping):
            prompts = [prompts]
        count = len(prompts)
        params = params or SamplingParams()
        each_params = [params] * count if isinstance(params, SamplingParams) else list(params)
        each_adapter = [adapters] * count if adapters is None or isinstance(adapters, str) else list(adapters)
        _check_count("params", each_params, count)
        _check_count("adapters", each_adapter, count)
        refs = {name: self._resolve(name) for name in dict.fromkeys(each_adapter)}
        outputs: dict[str, RequestOutput] = {}
        try:
            each_prompt = [self._token_ids(f"prompts[{i}]", prompt) for i, prompt in enumerate(prompts)]
            for token_ids, param, name in zip(each_prompt, each_params, each_adapter, strict=True):
                request = self._request(token_ids, param, refs[name], self.engine.end_tokens_of(name))
                self.engine.core.submit(request)
                output = RequestOutput(request, self.tokenizer, self.engine.core.abort)
                outputs[request.request_id] = output
            self._run(outputs)
        finally:
            for request_id in outputs:
                self.engine.core.abort(request_id)
        return [_result(output) for output in outputs.values()]

    def chat(
        self,
        conversations: Sequence[Sequence[Mapping[str, object]]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        adapters: str | Sequence[str | None] | None = None,
    ) -> list[Result]:
        """Answer every conversation, a list of messages as /v1/chat/completions takes them; the rest as `generate`.

        Raises InvalidChat for messages that are none, where there is no chat template, and where it refuses them.
        """
        if any(isinstance(message, str) for conversation in conversations for message in conversation):
            raise ValueError("conversations is one conversation: give a list of lists of messages")
        each = [_messages(f"conversations[{i}]", one) for i, one in enumerate(conversations)]
        names = [adapters] * len(each) if adapters is None or isinstance(adapters, str) else list(adapters)
        _check_count("adapters", names, len(each))
        tokenizers = {name: self.engine.tokenizer_of(name) for name in dict.fromkeys(names)}
        longest = self.engine.card.max_model_len
        prompts = [
            tokenizers[name].encode_chat(messages, most_tokens=longest)
            for name, messages in zip(names, each, strict=True)
        ]
        return self.generate(prompts, params, names)

    def close(self) -> None:
        """Stop what is shared with peers, the adapter loader's threads and the other devices' processes."""
        self.engine.core.wait_for_step()
        if self.engine.peers is not None:
            self.engine.peers.close()
        self.engine.close()

    def _resolve(self, name: str | None) -> AdapterRef:
        if name is None or name in self.engine.card.names:
            return BASE
        return self.engine.store.registry.resolve(name)

    def _token_ids(self, field: str, prompt: Any) -> tuple[int, ...]:
        """Return a prompt's token ids. Raises InvalidParameter that names `field` for what is no prompt."""
        if isinstance(prompt, Mapping):
            given = {
                key: value for key, value in cast(Mapping[Any, Any], prompt).items() if value is not None
            }
            if unknown := given.keys() - _PROMPT_KEYS:
                raise InvalidParameter(
                    field, sorted(map(str, unknown)), f"give one of {', '.join(_PROMPT_KEYS)}"
                )
            prompt = given.get("prompt_token_ids", given.get("prompt"))
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, most_tokens=self.engine.card.max_model_len, field=field)
        return as_integers(field, prompt)

    def _request(
        self, token_ids: tuple[int, ...], params: SamplingParams, adapter: AdapterRef, eos: tuple[int, ...]
    ) -> Request:
        if params.seed is None:
            params = replace(params, seed=self._seeds.getrandbits(63))
        self._submitted += 1
        return Request(f"offline-{self._submitted}", token_ids, adapter, params, eos, time.monotonic())

    def _run(self, outputs: dict[str, RequestOutput]) -> None:
        """Step until every request has ended."""
        pending = len(outputs)
        while pending:
            result = self.engine.core.step()
            pending -= self._deliver(outputs, result)
            if result.idle:
                self.engine.wait_ready()

    def _deliver(self, outputs: dict[str, RequestOutput], result: StepResult) -> int:
        """Give a step's events to their requests' outputs; return how many requests ended."""
        if result.failures:
            raise result.failures[0].error
        now_s, ended = time.monotonic(), 0
        for event in result.events:
            output = outputs[event.key.request_id]
            delta = output.push(event, now_s)
            if delta is None or delta.finish_reason is None:
                continue
            if event.finish_reason is None:
                self.engine.core.finish(event.key)
            ended += not output.is_open
        return ended


def _result(output: RequestOutput) -> Result:
    """Put together what came of a request that has ended."""
    by_index: list[list[Delta]] = [[] for _ in range(output.request.params.n)]
    for delta in output.take():
        by_index[delta.index].append(delta)
    joined = [join_deltas(deltas) for deltas in by_index]
    return Result(
        prompt_token_ids=output.request.prompt_token_ids,
        outputs=tuple(map(_output, joined)),
        prompt_logprobs=joined[0].prompt_logprobs,
        cached_tokens=output.cached_tokens,
        token_times_s=tuple(output.token_times_s[0]),
    )


def _output(joined: Delta) -> Output:
    assert joined.finish_reason is not None, "a sequence's last Delta says why it ended"
    return Output(joined.index, joined.text, joined.token_ids, joined.finish_reason, joined.logprobs)


def _messages(field: str, conversation: object) -> list[dict[str, str]]:
    """Return a conversation's messages as a chat template reads them. Raises InvalidChat that names `field`."""
    try:
        return chat_messages(msgspec.convert(conversation, list[Message], from_attributes=False))
    except msgspec.ValidationError as error:
        raise InvalidChat(f"chat refuses these messages, {field}: {error}") from None


def _check_count(field: str, values: Sequence[object], count: int) -> None:
    if len(values) != count:
        raise ValueError(f"{field} has {len(values)} entries for {count} prompts: give one, or one for each")
