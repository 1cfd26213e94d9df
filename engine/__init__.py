"""The engine does: it turns requests into steps, steps into tokens, tokens into answers.

What the package offers is imported when it is first asked for: the engine's smaller processes need no model.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.llm import LLM
    from engine.offline.inputs import LoRARequest
    from engine.offline.result import Output, Result
    from scheduler.request import SamplingParams
    from scheduler.structured_outputs import StructuredOutputsParams

__all__ = ["LLM", "LoRARequest", "Output", "Result", "SamplingParams", "StructuredOutputsParams"]

_HOMES = {
    "LoRARequest": "engine.offline.inputs",
    "Output": "engine.offline.result",
    "Result": "engine.offline.result",
    "SamplingParams": "scheduler.request",
    "StructuredOutputsParams": "scheduler.structured_outputs",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "engine.llm")), name)
