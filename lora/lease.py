"""Lease: the adapters that a step runs, pinned until it has ended."""

from collections.abc import Callable, Mapping
from types import TracebackType

from lora.segments import AdapterWeights


class Lease:
    """Adapters pinned for a step: `weights` by digest, valid until `release`."""

    def __init__(self, weights: Mapping[str, AdapterWeights], release: Callable[[], None]) -> None:
        self.weights = weights
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        """Let the adapters go; a second call does nothing."""
        release, self._release = self._release, None
        if release is not None:
            release()

    def __enter__(self) -> "Lease":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
