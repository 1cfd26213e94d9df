"""Weights: a model's tensors in the form that the forward pass uses. Knows nothing of files."""

from dataclasses import dataclass

from torch import Tensor

from model.config import LinearName, Quantization
from model.linear.base import Linear
from model.parallel import WHOLE, Shard


@dataclass(frozen=True, slots=True)
class WeightsForm:
    """How much of a model is loaded, how its layers' matrices are kept, and what multiplies by them on a CPU."""

    shard: Shard = WHOLE
    quantization: Quantization = "none"
    linear: LinearName = "torch"


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer. `qkv` and `gate_up` are fused in the order of SiteGroup. `qk_norm`, in the families that
    have it, is the weight of each head of q and then of k, [heads + kv heads, head_dim].
    """

    input_norm: Tensor  # [hidden]
    qkv: Linear
    qk_norm: Tensor | None
    out: Linear
    post_norm: Tensor  # [hidden]
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class Weights:
    """A whole model, or one device's part of it. `embedding` is [vocab, hidden]; a tied head is a second, packed
    form of the same numbers."""

    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # [hidden]
    head: Linear
