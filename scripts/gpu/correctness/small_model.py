"""Write a small seeded Llama with adapters, as an operator gives them: a Hugging Face folder and PEFT folders."""

# The types of transformers, tokenizers and safetensors are incomplete.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lora.target_modules import SITES, SiteGroup

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 256, 672, 3, 4, 2, 64, 512
RANKS = {"r5": 5, "r8": 8, "r16": 16, "r24": 24, "r64": 64, "r128": 128}
SITES_OF = {"r8": ("q_proj", "v_proj"), "r24": ("k_proj", "o_proj", "down_proj")}
"""Adapters that change these sites alone."""

_SPECIAL = ("<pad>", "<bos>", "<eos>")
_MLP = (*SiteGroup.GATE_UP.sites, *SiteGroup.DOWN.sites)
_SIZES = {
    "q_proj": (HEADS * HEAD_DIM, HIDDEN),
    "k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "o_proj": (HIDDEN, HEADS * HEAD_DIM),
    "gate_proj": (INNER, HIDDEN),
    "up_proj": (INNER, HIDDEN),
    "down_proj": (HIDDEN, INNER),
}


def write(folder: Path, seed: int) -> None:
    """Write `base` and, below `loras`, an adapter of each of RANKS."""
    base, generator = folder / "base", torch.Generator().manual_seed(seed)
    base.mkdir(parents=True)
    _write_tokenizer(base)
    (base / "config.json").write_text(json.dumps(_config()))
    save_file(dict(_weights(generator)), base / "model.safetensors", metadata={"format": "pt"})
    for name, rank in RANKS.items():
        _write_adapter(folder / "loras" / name, rank, SITES_OF.get(name, SITES), generator)


def _config() -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _draw(generator: torch.Generator, *shape: int, gain: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=generator) * gain / math.sqrt(shape[-1])).to(torch.bfloat16)


def _weights(generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """Draw weights: norms are near one, and the head is strong, so that the likeliest token is clear of the next."""

    def norm() -> Tensor:
        return (1 + 0.1 * torch.randn(HIDDEN, generator=generator)).to(torch.bfloat16)

    yield "model.embed_tokens.weight", _draw(generator, VOCAB, HIDDEN, gain=math.sqrt(HIDDEN))
    for layer in range(LAYERS):
        for site, size in _SIZES.items():
            gain = 0.5 if site in ("o_proj", "down_proj") else 1.0
            yield f"model.{_path(layer, site)}.weight", _draw(generator, *size, gain=gain)
        yield f"model.layers.{layer}.input_layernorm.weight", norm()
        yield f"model.layers.{layer}.post_attention_layernorm.weight", norm()
    yield "model.norm.weight", norm()
    yield "lm_head.weight", _draw(generator, VOCAB, HIDDEN, gain=2.0)


def _write_adapter(folder: Path, rank: int, sites: tuple[str, ...], generator: torch.Generator) -> None:
    folder.mkdir(parents=True)
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": list(sites),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    tensors: dict[str, Tensor] = {}
    for layer in range(LAYERS):
        for site in sites:
            outputs, inputs = _SIZES[site]
            path = f"base_model.model.model.{_path(layer, site)}"
            tensors[f"{path}.lora_A.weight"] = _draw(generator, rank, inputs)
            tensors[f"{path}.lora_B.weight"] = _draw(generator, outputs, rank, gain=0.5)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _path(layer: int, site: str) -> str:
    return f"layers.{layer}.{'mlp' if site in _MLP else 'self_attn'}.{site}"


def _write_tokenizer(folder: Path) -> None:
    """Write a tokenizer with a token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*_SPECIAL, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(_SPECIAL))
    named = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **named).save_pretrained(str(folder))
