"""What tests of `LLM` ask of the embedded model, and how they read its answers."""

from typing import Any

from engine import SamplingParams
from engine.offline.result import Result

GREEDY = SamplingParams(temperature=0)


def user(text: str) -> list[dict[str, object]]:
    """A conversation of one message."""
    return [{"role": "user", "content": text}]


ASK: Any = user("garden")


def said(results: list[Result]) -> list[str]:
    """The first answer to each prompt."""
    return [result.outputs[0].text for result in results]
