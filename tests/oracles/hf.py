"""Small random Hugging Face checkpoints of every family that is served, and transformers' answers for
them."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

transformers.utils.logging.disable_progress_bar()

_SIZE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _llama(**fields: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**{**_SIZE, **fields}))


def _rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0, **fields}


def build(family: str) -> PreTrainedModel:
    """The model of that name in FAMILIES, its weights seeded and spread so that no part of it may be left
    out."""
    torch.manual_seed(0)
    model = FAMILIES[family]()
    for number, (name, parameter) in enumerate(sorted(model.named_parameters())):
        _initialise(name, parameter, torch.Generator().manual_seed(number))
    return model.eval()


_LLAMA3_ROPE = _rope(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)

FAMILIES = {
    "llama-2": lambda: _llama(num_key_value_heads=4),
    "llama-3": lambda: _llama(rope_parameters=_rope("default", rope_theta=500000.0)),
    "llama-3.1": lambda: _llama(rope_parameters=_LLAMA3_ROPE),
    "llama-3.2-tied": lambda: _llama(rope_parameters=_LLAMA3_ROPE, tie_word_embeddings=True),
    "llama-linear": lambda: _llama(rope_parameters=_rope("linear", factor=4.0)),
    "llama-dynamic": lambda: _llama(rope_parameters=_rope("dynamic", factor=2.0), max_position_embeddings=24),
    "llama-biased": lambda: _llama(attention_bias=True, mlp_bias=True),
    "llama-head-dim": lambda: _llama(head_dim=32, num_key_value_heads=1),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**{**_SIZE, "sliding_window": 12})),
    "mistral-full": lambda: MistralForCausalLM(
        MistralConfig(**{**_SIZE, "sliding_window": None, "head_dim": 32})
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**{**_SIZE, "tie_word_embeddings": True})),
    "qwen2-window": lambda: Qwen2ForCausalLM(
        Qwen2Config(**{**_SIZE, "use_sliding_window": True, "sliding_window": 10, "max_window_layers": 1})
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**{**_SIZE, "head_dim": 32})),
}


def save(model: PreTrainedModel, folder: Path, shard_bytes: int = 10**9) -> Path:
    """Write the checkpoint as safetensors, sharded when larger than `shard_bytes`."""
    model.save_pretrained(folder, max_shard_size=shard_bytes)
    return folder


def logits(model: torch.nn.Module, token_ids: Sequence[int]) -> Tensor:
    """[T, vocab] float32, the whole prompt in one pass."""
    with torch.no_grad():
        return model(torch.tensor([list(token_ids)])).logits[0].float()


def greedy(model: PreTrainedModel, token_ids: Sequence[int], max_new_tokens: int) -> list[int]:
    """The tokens that greedy decoding adds, ends ignored."""
    prompt = torch.tensor([list(token_ids)])
    settings = transformers.GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0, eos_token_id=10**6
    )
    generate: Any = model.generate  # transformers' own annotation refuses its own models
    out = generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
    return out[0, len(token_ids) :].tolist()


def _initialise(name: str, parameter: torch.nn.Parameter, generator: torch.Generator) -> None:
    """Norms near one, biases visible, matrices at 1/sqrt(fan in), the head larger so that logits are well
    apart."""
    noise = torch.randn(parameter.shape, generator=generator)
    if parameter.ndim == 1:
        parameter.data = 0.3 * noise + (1.0 if "norm" in name else 0.0)
    elif "embed_tokens" in name:
        parameter.data = noise
    else:
        parameter.data = noise * (3.0 if "lm_head" in name else 1.0) / math.sqrt(parameter.shape[1])
