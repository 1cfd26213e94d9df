"""Make the HTTP bodies that planned requests become, sound ones and malformed ones.

A request is random token ids to a completion of fixed length. Where the models are the embedded ones, it is a
task whose answer is known. So load also shows whether each adapter still answers correctly.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Protocol

from engine.demo.embedded import TASKS, Task
from scripts.bench.serving.tenants import task_name
from scripts.bench.serving.traffic import ClientFault, PlannedRequest

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TOKEN_IDS = range(32, 256)
"""Drawn from for prompts: ids that every vocabulary has, above most vocabularies' special ones."""
TASK_OUTPUT_TOKENS = 24


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """What to POST where; `answer` is the only right text, None if any is."""

    path: str
    body: bytes
    answer: str | None = None

    def for_model(self, model: str) -> "HttpRequest":
        """Make the same request to another model."""
        return replace(self, body=encode(json.loads(self.body) | {"model": model}))


class RequestMaker(Protocol):
    """Make the HTTP request that a planned one becomes."""

    def __call__(self, planned: PlannedRequest, rng: Random) -> HttpRequest: ...


def token_request(planned: PlannedRequest, rng: Random) -> HttpRequest:
    """Ask for a completion of exactly the planned lengths."""
    return HttpRequest(COMPLETIONS, encode(completion(planned, rng)))


def completion(planned: PlannedRequest, rng: Random) -> dict[str, Any]:
    """Make its body."""
    return {
        "model": planned.model,
        "prompt": rng.choices(TOKEN_IDS, k=planned.prompt_tokens),
        "max_tokens": planned.output_tokens,
        "ignore_eos": True,
        "temperature": 1.0,
        "seed": rng.getrandbits(31),
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def task_request(planned: PlannedRequest, rng: Random) -> HttpRequest:
    """Ask the embedded model for a task: an adapter for its own as bare input, the base for any by its name."""
    by_name = {task.name: task for task in TASKS}
    own: Task | None = by_name.get(task_name(planned.model))
    task = own or rng.choice(TASKS)
    text = task.make_input(rng)
    content = text if own else task.instruction(text)
    body = {
        "model": planned.model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": TASK_OUTPUT_TOKENS,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return HttpRequest(CHAT, encode(body), task.answer(text))


def encode(body: Mapping[str, Any]) -> bytes:
    """Encode a body as JSON."""
    return json.dumps(body).encode()


def without(body: Mapping[str, Any], field: str) -> dict[str, Any]:
    """Copy the body without one field."""
    return {name: value for name, value in body.items() if name != field}


SPOIL: Mapping[ClientFault, Callable[[dict[str, Any], int], bytes]] = {
    ClientFault.BAD_JSON: lambda body, most_tokens: encode(body)[:-1],
    ClientFault.UNKNOWN_MODEL: lambda body, most_tokens: encode(body | {"model": "no such model"}),
    ClientFault.WRONG_TYPE: lambda body, most_tokens: encode(body | {"max_tokens": "many"}),
    ClientFault.WRONG_VALUE: lambda body, most_tokens: encode(body | {"temperature": -1}),
    ClientFault.MISSING_FIELD: lambda body, most_tokens: encode(without(body, "prompt")),
    ClientFault.TOO_LONG: lambda body, most_tokens: encode(
        body | {"prompt": [TOKEN_IDS[0]] * (most_tokens + 1)}
    ),
}
"""How each malformed request differs from a sound completion."""


def malformed_request(planned: PlannedRequest, most_tokens: int, rng: Random) -> HttpRequest:
    """Make the malformed completion of a request whose fault is one of `SPOIL`."""
    assert planned.fault is not None, "a sound request is not made malformed"
    return HttpRequest(COMPLETIONS, SPOIL[planned.fault](completion(planned, rng), most_tokens))
