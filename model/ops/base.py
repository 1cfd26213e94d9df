"""Define the seam of a layer's arithmetic between its base matrices.

These are norms, and what consumes each projection together with the adapters' share of it. A backend may fuse the
share into its consumer; every backend passes tests/conformance/test_layer_ops.py.
"""

from collections.abc import Hashable
from typing import NamedTuple, Protocol

from torch import Tensor

from lora.target_modules import SiteGroup
from model.batch import ForwardBatch
from model.kv_cache import KVCache
from model.linear.base import Linear


class Heads(NamedTuple):
    """A step's rows by head: q [T, num_heads, head_dim], k and v [T, num_kv_heads, head_dim]; rows may be strided."""

    q: Tensor
    k: Tensor
    v: Tensor


class LayerStep(Protocol):
    """One step's arithmetic, planned. In all of it y' is the base projection of `x`, `project(x)`, plus each adapter's
    own update on its rows. x and y are contiguous; a backend calls `project` once, so that it may start the adapters'
    part of the work beside it, and may overwrite what it returns."""

    def embed(self, embedding: Tensor, token_ids: Tensor) -> Tensor:
        """Return the rows of `embedding` ([vocab, hidden]) that `token_ids` ([T] int64) name, each with its adapter's
        update: [T, hidden]."""
        ...

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """Apply RMS norm over the last dimension; x: [T, n]."""
        ...

    def store_heads(self, layer: int, project: Linear, x: Tensor, qk_norm: Tensor | None) -> Heads:
        """Return the heads of y' ([T, fused q, k and v]); k and v are in the cache when it returns.

        q and k are normed by `qk_norm` ([num_heads + num_kv_heads, head_dim]) where given, and rotated by position.
        """
        ...

    def gate(self, layer: int, project: Linear, x: Tensor) -> Tensor:
        """Return silu(gate') * up', [T, n], of y' [T, 2n], gate and up."""
        ...

    def add(
        self, layer: int, group: SiteGroup, project: Linear, x: Tensor, residual: Tensor | None
    ) -> Tensor:
        """Return residual + y' (or y' alone), [T, hidden], for the groups OUT and DOWN."""
        ...

    def head(self, project: Linear, x: Tensor) -> Tensor:
        """Return y' of the batch's logit rows, [L, vocab]. No other method is called after it."""
        ...


class LayerOps(Protocol):
    """Plans once per step what all layers share: rotations, slots and the adapters' segments."""

    def plan(self, batch: ForwardBatch, cache: KVCache) -> LayerStep:
        """The step's arithmetic over `batch`; reads no device tensor back to the host."""
        ...


class GraphOps(LayerOps, Protocol):
    """Ops whose steps can be captured in a CUDA graph: `plan`, called while capturing, launches nothing that depends on
    the host but what `load` has sent."""

    def load(self, batch: ForwardBatch) -> Hashable:
        """Lay the step's work where captured launches read it, on the stream that will replay. Steps of as many rows
        whose keys are equal can be computed by one graph; the key is the result."""
        ...
