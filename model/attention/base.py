"""Define attention's seam. Every backend passes tests/conformance/test_attention.py; none knows another."""

from typing import Protocol

from torch import Tensor

from model.batch import ForwardBatch
from model.kv_cache import KVCache


class AttentionStep(Protocol):
    """One step's attention, planned; called once per layer, in order."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Compute softmax(q Kᵀ / sqrt(head_dim)) V over the cache, which holds the step's own rows already.

        k and v are those rows once more, for a backend that need not look them up in the cache.
        q: [T, num_heads, head_dim], k, v: [T, num_kv_heads, head_dim], of the cache's dtype; rows may be
        strided, a row is contiguous. Query head h reads kv head h // (num_heads / num_kv_heads). A row sees
        its own sequence's positions up to its own, and only the last `window` of them in a layer with a
        sliding window. Returns [T, num_heads * head_dim], contiguous.
        """
        ...


class AttentionBackend(Protocol):
    """Plans once per step what all layers share: lengths, block tables and masks, from the batch's host
    side."""

    def plan(self, batch: ForwardBatch, cache: KVCache) -> AttentionStep:
        """The step's attention over `cache`. Reads no device tensor back to the host where that costs a
        wait."""
        ...


class ReservedStep(AttentionStep, Protocol):
    """A decode step whose buffers never move, so that a graph captured over `attend` may be replayed."""

    def refill(self, batch: ForwardBatch) -> None:
        """Lay another step into the buffers, on the stream that will replay: one row for each of up to `rows`
        sequences, the batch's i-th being row i of q. Further rows of q attend to nothing that matters and are
        not written or are finite."""
        ...


class GraphAttention(AttentionBackend, Protocol):
    """A backend whose decode steps can be captured in a CUDA graph."""

    def reserve(self, rows: int, blocks: int, cache: KVCache) -> ReservedStep:
        """Buffers for decode steps of up to `rows` sequences, each of up to `blocks` blocks of `cache`."""
        ...


class UnsupportedAttention(ValueError):
    """A backend that was asked for by name cannot attend here; `backend` is its name, `remedy` says what to do."""

    def __init__(self, backend: str, remedy: str) -> None:
        super().__init__(f"attention backend {backend!r}: {remedy}")
        self.backend, self.remedy = backend, remedy
