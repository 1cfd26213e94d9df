"""Generate offline, in the caller's own thread: the server's core and its rule for messages, without HTTP."""

import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Self

from tqdm import tqdm

from engine.assembly.assembly import assemble
from engine.config.config import EngineConfig
from engine.config.option import from_python
from engine.offline.inputs import (
    AdapterChoice,
    Adapters,
    Conversations,
    LoRARequests,
    Params,
    Prompt,
    chat_token_ids,
    check_one_folder_a_name,
    conversation_list,
    each_adapter,
    each_params,
    prompt_list,
    prompt_token_ids,
)
from engine.offline.interruption import interruptible_between_steps
from engine.offline.offered_tools import OfferedTools, with_calls
from engine.offline.result import Result, result_of
from engine.output import RequestOutput
from engine.step_result import StepResult
from engine.tokenizer import Tokenizer
from lora.adapter import BASE, AdapterRef
from lora.sources.source_url import is_url, source_text
from scheduler.limits import RequestRefused
from scheduler.request import InvalidParameter, Request, SamplingParams

P = ParamSpec("P")


def _like(
    config: Callable[P, EngineConfig],
) -> Callable[[Callable[..., None]], Callable[Concatenate[Any, P], None]]:
    """Give a constructor the parameters of `config`, for type checkers: the fields are declared there alone."""

    def same(constructor: Callable[..., None]) -> Callable[Concatenate[Any, P], None]:
        return constructor

    return same


class LLM:
    """A base model and its adapters, for batch generation.

    >>> llm = LLM()                                      # the embedded demo model, with its adapters
    >>> llm.chat([{"role": "user", "content": "garden"}], SamplingParams(temperature=0), adapters="reverse")

    It takes EngineConfig's fields, of which docs/options.md tells: `model` is a folder or hub id, `loras` maps names to
    PEFT folders, sizes may be texts as `"512MiB"`. `with LLM() as llm` closes it at the end. Not thread-safe. Raises
    what assembling raises (UnsupportedModel, AdapterRefused, InvalidConfig, ...).
    """

    @_like(EngineConfig)
    def __init__(self, *arguments: Any, **options: Any) -> None:
        """Load the model and its adapters; progress of that is shown only if asked for."""
        config = from_python(EngineConfig, arguments, {"progress": False, **options})
        self.engine = assemble(config)
        self._seeds = random.Random()
        self._submitted = 0
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer and chat template."""
        return self.engine.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Params | None = None,
        adapters: Adapters | None = None,
        *,
        sampling_params: Params | None = None,
        lora_request: LoRARequests | None = None,
        use_tqdm: bool | None = None,
    ) -> list[Result]:
        """Answer every prompt: text, token ids, or a dict of one of them as `prompt` or `prompt_token_ids`.

        Results come in the prompts' order. One prompt alone is a list of one.

        `params` and `adapters` are one for all or one per prompt; adapter None is the base. `lora_request` stands
        in for `adapters` and reads an adapter's folder when it is first used; `sampling_params` is another name of
        `params`. A progress bar is shown if stderr is a terminal, unless `use_tqdm` says otherwise. Raises
        UnknownAdapter, AdapterRefused or a ValueError that names the field before anything runs, EngineError if the
        engine gives up; either way, as after KeyboardInterrupt, nothing of the call is left behind.
        """
        each = prompt_list(prompts)
        choices = each_adapter(adapters, lora_request, len(each))
        most = self.engine.card.max_model_len
        token_ids = [
            prompt_token_ids(f"prompts[{i}]", prompt, self.tokenizer, most) for i, prompt in enumerate(each)
        ]
        return self._answer(token_ids, each_params(params, sampling_params, len(each)), choices, use_tqdm)

    def chat(
        self,
        conversations: Conversations,
        params: Params | None = None,
        adapters: Adapters | None = None,
        *,
        sampling_params: Params | None = None,
        lora_request: LoRARequests | None = None,
        use_tqdm: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
    ) -> list[Result]:
        """Answer every conversation, a list of messages as /v1/chat/completions takes them; the rest as `generate`.

        The messages of one conversation alone are taken too; its result is a list of one. `tools` are offered to all,
        in OpenAI's form; calls stand in `tool_calls` of outputs. Raises InvalidChat for messages that are none, where
        there is no chat template, and where it refuses them.
        """
        several, on_offer = conversation_list(conversations), OfferedTools.of(tools, tool_choice)
        choices = each_adapter(adapters, lora_request, len(several))
        each = each_params(params, sampling_params, len(several))
        tokenizers, most = self._tokenizers(choices), self.engine.card.max_model_len
        asked = [on_offer.asked(one, tokenizers[choices[i]]) for i, one in enumerate(each)]
        token_ids = [
            chat_token_ids(f"conversations[{i}]", one, tokenizers[choices[i]], most, on_offer.told)
            for i, one in enumerate(several)
        ]
        results = self._answer(token_ids, [params for _, params in asked], choices, use_tqdm)
        return [with_calls(result, use) for result, (use, _) in zip(results, asked, strict=True)]

    def close(self) -> None:
        """Stop what is shared with peers, the adapter loader's threads and the other devices' processes, once."""
        if self._closed:
            return
        self._closed = True
        self.engine.core.driving.acquire()  # for good: nothing steps any more
        self.engine.core.wait_for_step()
        if self.engine.peers is not None:
            self.engine.peers.close()
        self.engine.close()

    def _answer(
        self,
        prompts: Sequence[tuple[int, ...]],
        each_params: Sequence[SamplingParams],
        choices: Sequence[AdapterChoice],
        use_tqdm: bool | None,
    ) -> list[Result]:
        """Run all prompts to their end and return their results."""
        refs = self._resolve_all(choices)
        outputs: dict[str, RequestOutput] = {}
        with self.engine.core.driving:
            try:
                for number, token_ids in enumerate(prompts):
                    choice = choices[number]
                    request = self._request(token_ids, each_params[number], refs[choice], choice.name)
                    self._submit(number, request)
                    output = RequestOutput(request, self.tokenizer, self.engine.core.abort)
                    outputs[request.request_id] = output
                hidden = None if use_tqdm is None else not use_tqdm  # None: unless stderr is a terminal
                with tqdm(total=len(outputs), unit="prompt", disable=hidden, file=sys.stderr) as bar:
                    self._run(outputs, bar.update)
            finally:
                for request_id in outputs:
                    self.engine.core.abort(request_id)
        return [result_of(output) for output in outputs.values()]

    def _tokenizers(self, choices: Sequence[AdapterChoice]) -> dict[AdapterChoice, Tokenizer]:
        """Return the tokenizers of the chosen adapters, whose chat templates may be their own."""
        return {choice: self.engine.tokenizer_of(choice.name) for choice in self._resolve_all(choices)}

    def _resolve_all(self, choices: Sequence[AdapterChoice]) -> dict[AdapterChoice, AdapterRef]:
        """Return the adapters that the prompts are to have."""
        if self._closed:
            raise RuntimeError("this LLM is closed: make another one")
        check_one_folder_a_name(choices)
        with interruptible_between_steps():  # an adapter's trial is a step
            return {choice: self._resolve(choice) for choice in dict.fromkeys(choices)}

    def _resolve(self, choice: AdapterChoice) -> AdapterRef:
        """Return the adapter that a prompt is to have; one given with a folder is read unless its name means that."""
        if choice.name is None or (choice.folder is None and choice.name in self.engine.card.names):
            return BASE
        registry = self.engine.store.registry
        if choice.folder is not None:
            bound = registry.source(choice.name)
            known = bound if is_url(bound) else str(Path(bound).absolute())
            if not bound or known != source_text(choice.folder):
                return registry.load(choice.name, choice.folder)
        return registry.resolve(choice.name)

    def _submit(self, number: int, request: Request) -> None:
        """Queue the request of prompt `number`. Raises InvalidParameter or RequestRefused that names the prompt."""
        try:
            self.engine.core.submit(request)
        except InvalidParameter as error:
            field = "" if error.field == "prompt" else f": {error.field}"
            raise InvalidParameter(f"prompts[{number}]{field}", error.value, error.remedy) from None
        except RequestRefused as error:
            raise RequestRefused(f"prompts[{number}]: {error}") from None

    def _request(
        self, token_ids: tuple[int, ...], params: SamplingParams, adapter: AdapterRef, name: str | None
    ) -> Request:
        if params.seed is None:
            params = replace(params, seed=self._seeds.getrandbits(63))
        self._submitted += 1
        eos = self.engine.end_tokens_of(name)
        asked, name = params.structured_outputs, f"offline-{self._submitted}"
        grammar = None if asked is None else self.engine.grammars.compile(asked)
        return Request(name, token_ids, adapter, params, eos, time.monotonic(), grammar=grammar)

    def _run(self, outputs: dict[str, RequestOutput], ended: Callable[[int], object]) -> None:
        """Step until every request has ended, and tell `ended` how many did."""
        pending = len(outputs)
        with interruptible_between_steps() as check:
            while pending:
                check()
                result = self.engine.core.step()
                done = self._deliver(outputs, result)
                pending -= done
                ended(done)
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
