"""The engine does: it turns requests into steps, steps into tokens, tokens into answers."""

from engine.llm import LLM, Output, Result
from engine.offline.inputs import LoRARequest
from scheduler.request import SamplingParams

__all__ = ["LLM", "LoRARequest", "Output", "Result", "SamplingParams"]
