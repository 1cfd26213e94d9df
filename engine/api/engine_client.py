"""Define what the API needs of an engine, and no more. `engine.async_engine` implements it, and so do the tests."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Protocol

from engine.telemetry import Snapshot, Telemetry
from engine.tokenizer import Delta, Tokenizer
from lora.adapter import AdapterRef
from lora.names import AdapterEntry
from scheduler.request import SamplingParams


class OutputStreamClient(Protocol):
    """One request's answer as it comes: the Deltas of all its sequences, interleaved; each sequence ends with a
    finish_reason. Raises EngineError if the engine gives the request up."""

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that the prefix cache supplied; known with the first Delta."""
        ...

    def __aiter__(self) -> AsyncIterator[Delta]: ...

    async def aclose(self) -> None:
        """Abort what still runs and free it."""
        ...


class EngineClient(Protocol):
    """A node as its doors see it."""

    @property
    def codec(self) -> Tokenizer: ...
    @property
    def telemetry(self) -> Telemetry: ...
    @property
    def model_name(self) -> str: ...
    @property
    def model_root(self) -> str: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def created_s(self) -> int: ...

    async def start(self) -> None:
        """Begin to work."""
        ...

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new and wait, at most `timeout_s`, for what runs to end."""
        ...

    async def close(self) -> None:
        """Stop; what still runs ends with an error."""
        ...

    async def submit(
        self, model: str, prompt_token_ids: tuple[int, ...], params: SamplingParams, request_id: str
    ) -> OutputStreamClient:
        """Queue a request. Raises UnknownModel, InvalidParameter, RequestRefused, Overloaded or Draining."""
        ...

    async def load_adapter(self, name: str, folder: Path) -> AdapterRef:
        """Read, check and register an adapter. Raises what the adapter's reader refuses with."""
        ...

    async def unload_adapter(self, name: str) -> None:
        """Forget an adapter. Raises UnknownModel."""
        ...

    def adapters(self) -> tuple[AdapterEntry, ...]:
        """The adapters that requests may name."""
        ...

    def may_serve(self, model: str) -> bool:
        """False if `model` is neither the base model nor an adapter; True also for what a peer may have."""
        ...

    def stats(self) -> Snapshot:
        """The node at this moment."""
        ...
