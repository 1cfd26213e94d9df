"""Describe a Llama-family model in one set of words, whatever family it is of.

A family is its fields, never a branch in the forward pass. `model.config_file` reads them from a checkpoint. It names
what may be chosen of the computation, and may not know torch: some processes of a cluster compute nothing.
"""

from dataclasses import dataclass
from typing import Literal

from lora.target_modules import BaseShape, SiteShape

DtypeName = Literal["float32", "float16", "bfloat16"]
DtypeChoice = Literal["auto", "float32", "bfloat16", "float16"]
AttentionName = Literal["torch", "native", "triton", "flashinfer"]
AttentionChoice = Literal["auto", AttentionName]
LinearName = Literal["torch", "native"]
LinearChoice = Literal["auto", LinearName]
Quantization = Literal["none", "int8", "fp8"]


class UnsupportedModel(ValueError):
    """A checkpoint that cannot be served as it is; says which field, what it was, and what would be
    accepted."""

    def __init__(self, field: str, value: object, remedy: str) -> None:
        super().__init__(f"{field}={value!r} is not supported: {remedy}")
        self.field, self.value, self.remedy = field, value, remedy


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """How positions become rotations. `kind` is "default", "linear", "dynamic" or "llama3"; `factor` is
    unused by "default", the two frequency factors by all but "llama3". `original_max_tokens` is the length of
    pretraining.
    """

    kind: str
    theta: float
    factor: float
    original_max_tokens: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One Llama-family model. `windows` gives each layer's sliding window in tokens (the query's own
    included), None where the layer attends to everything. `dtype` is the checkpoint's.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    windows: tuple[int | None, ...]
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied_embeddings: bool
    max_model_len: int
    dtype: DtypeName
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @property
    def q_size(self) -> int:
        """Columns of the query projection's output."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Columns of the key (or value) projection's output."""
        return self.num_kv_heads * self.head_dim

    def base_shape(self) -> BaseShape:
        """What an adapter of this model must fit."""
        hidden, mlp, q, kv = self.hidden_size, self.intermediate_size, self.q_size, self.kv_size
        sizes = (
            (hidden, q),
            (hidden, kv),
            (hidden, kv),
            (q, hidden),
            (hidden, mlp),
            (hidden, mlp),
            (mlp, hidden),
        )
        outer = SiteShape(hidden, self.vocab_size), SiteShape(self.vocab_size, hidden)
        return BaseShape(self.num_layers, tuple(SiteShape(*size) for size in sizes), outer)
