"""The models that are checked and timed, on a device and in a dry run. Knows no tensor and no device."""

from dataclasses import dataclass

import torch

from model.config import DtypeName, ModelConfig, RopeConfig


def llama(
    hidden: int, inner: int, layers: int, heads: tuple[int, int, int], vocab: int, dtype: DtypeName
) -> ModelConfig:
    """Make a Llama 3.1 with these sizes; `heads` are query heads, K/V heads, and the size of one."""
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=heads[2],
        rms_norm_eps=1e-5,
        rope=RopeConfig("llama3", 500000.0, 8.0, 8192),
        windows=(None,) * layers,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        qk_norm=False,
        tied_embeddings=False,
        max_model_len=131072,
        dtype=dtype,
        bos_token_id=None,
        eos_token_ids=(),
    )


@dataclass(frozen=True, slots=True)
class CheckSizes:
    """How large everything is. `layers` are one-layer configurations for kernels, each in its own dtype.

    Every further one is a minute of the kernels' compiler. `timed` is the model that is timed. It decodes for
    each of `widths` sequences, `context_tokens` long; the first width meets every mix of ranks.
    """

    layers: tuple[ModelConfig, ...]
    timed: ModelConfig
    widths: tuple[int, ...]
    context_tokens: int
    prefill_rows: int
    decode_steps: int
    replays: int
    copy_bytes: int
    square: int
    vocab: int
    requests: int
    weights_dtype: torch.dtype


FULL = CheckSizes(
    layers=(
        llama(4096, 14336, 1, (32, 8, 128), 8, "bfloat16"),
        llama(320, 672, 1, (6, 2, 64), 8, "float32"),
    ),
    timed=llama(4096, 14336, 32, (32, 8, 128), 128256, "bfloat16"),
    widths=(32, 64, 128),
    context_tokens=1024,
    prefill_rows=8192,
    decode_steps=48,
    replays=12,
    copy_bytes=1 << 30,
    square=8192,
    vocab=128256,
    requests=40,
    weights_dtype=torch.bfloat16,
)
"""A device's: Llama-3.1-8B."""

TINY = CheckSizes(
    layers=(
        llama(64, 144, 1, (4, 2, 16), 8, "bfloat16"),
        llama(64, 144, 1, (4, 2, 16), 8, "float32"),
    ),
    timed=llama(32, 48, 2, (4, 2, 8), 96, "float32"),
    widths=(4, 8),
    context_tokens=24,
    prefill_rows=96,
    decode_steps=4,
    replays=1,
    copy_bytes=1 << 20,
    square=128,
    vocab=1000,
    requests=10,
    weights_dtype=torch.float32,
)
"""A dry run's."""
