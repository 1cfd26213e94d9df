"""Questions: the HTTP bodies that arrivals become, sound ones and malformed ones.

A question is random token ids to a completion of fixed length; where the models are the embedded ones, it is
a task whose answer is known, so that load also shows whether each adapter's work is still right.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

from engine.demo.embedded import TASKS, Task
from scripts.bench.traffic import Arrival, Fault

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TOKEN_IDS = range(32, 256)
"""Drawn from for prompts: ids that every vocabulary has, above most vocabularies' special ones."""
TASK_OUTPUT_TOKENS = 24


@dataclass(frozen=True, slots=True)
class Question:
    """What to POST where; `answer` is the only right text, None if any is."""

    path: str
    body: bytes
    answer: str | None = None


class Inquirer(Protocol):
    """Makes an arrival's question."""

    def __call__(self, arrival: Arrival, rng: Random) -> Question: ...


def ask_tokens(arrival: Arrival, rng: Random) -> Question:
    """A completion of exactly the arrival's lengths."""
    return Question(COMPLETIONS, encode(completion(arrival, rng)))


def completion(arrival: Arrival, rng: Random) -> dict[str, Any]:
    """Its body."""
    return {
        "model": arrival.model,
        "prompt": rng.choices(TOKEN_IDS, k=arrival.prompt_tokens),
        "max_tokens": arrival.output_tokens,
        "ignore_eos": True,
        "temperature": 1.0,
        "seed": rng.getrandbits(31),
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def ask_task(arrival: Arrival, rng: Random) -> Question:
    """A task of the embedded model: an adapter's own one as bare input, of the base any one by its name."""
    by_name = {task.name: task for task in TASKS}
    task: Task = by_name.get(arrival.model) or rng.choice(TASKS)
    text = task.make_input(rng)
    content = text if task.name == arrival.model else task.instruction(text)
    body = {
        "model": arrival.model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": TASK_OUTPUT_TOKENS,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return Question(CHAT, encode(body), task.answer(text))


def encode(body: Mapping[str, Any]) -> bytes:
    """A body as JSON."""
    return json.dumps(body).encode()


def without(body: Mapping[str, Any], field: str) -> dict[str, Any]:
    """The body less one field."""
    return {name: value for name, value in body.items() if name != field}


SPOIL: Mapping[Fault, Callable[[dict[str, Any], int], bytes]] = {
    Fault.BAD_JSON: lambda body, most_tokens: encode(body)[:-1],
    Fault.UNKNOWN_MODEL: lambda body, most_tokens: encode(body | {"model": "no such model"}),
    Fault.WRONG_TYPE: lambda body, most_tokens: encode(body | {"max_tokens": "many"}),
    Fault.WRONG_VALUE: lambda body, most_tokens: encode(body | {"temperature": -1}),
    Fault.MISSING_FIELD: lambda body, most_tokens: encode(without(body, "prompt")),
    Fault.TOO_LONG: lambda body, most_tokens: encode(body | {"prompt": [TOKEN_IDS[0]] * (most_tokens + 1)}),
}
"""How each malformed request differs from a sound completion."""


def ask_badly(arrival: Arrival, most_tokens: int, rng: Random) -> Question:
    """The malformed completion of an arrival whose fault is one of `SPOIL`."""
    assert arrival.fault is not None, "a sound arrival is not asked badly"
    return Question(COMPLETIONS, SPOIL[arrival.fault](completion(arrival, rng), most_tokens))
