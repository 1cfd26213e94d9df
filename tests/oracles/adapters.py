"""Random PEFT folders: written by PEFT itself for the oracle, or by hand where hundreds are wanted quickly."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import safetensors.torch
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lora.target_modules import OUTER_SITES, SITES, BaseShape, SiteShape

TINY = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    tie_word_embeddings=False,
)
MLP_SITES = ("gate_proj", "up_proj", "down_proj")


def base_shape(config: LlamaConfig = TINY) -> BaseShape:
    """What an adapter of a Llama with this configuration must fit."""
    hidden, inner = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads
    head_dim = config.head_dim or hidden // heads
    q, kv = heads * head_dim, (config.num_key_value_heads or heads) * head_dim
    sizes = (
        (hidden, q),
        (hidden, kv),
        (hidden, kv),
        (q, hidden),
        (hidden, inner),
        (hidden, inner),
        (inner, hidden),
    )
    outer = SiteShape(hidden, config.vocab_size), SiteShape(config.vocab_size, hidden)
    return BaseShape(config.num_hidden_layers, tuple(SiteShape(*size) for size in sizes), outer)


def module_path(layer: int, site: str) -> str:
    """The module's name in a LlamaForCausalLM."""
    if site in OUTER_SITES:
        return f"model.{site}" if site == "embed_tokens" else site
    return f"model.layers.{layer}.{'mlp' if site in MLP_SITES else 'self_attn'}.{site}"


def peft_model(config: peft.LoraConfig, seed: int, base: LlamaConfig = TINY) -> peft.PeftModel:
    """A random base model under a random adapter whose B is not zero."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(LlamaForCausalLM(base), config)
    assert isinstance(model, peft.PeftModel)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    return model


def deltas(model: peft.PeftModel) -> dict[str, Tensor]:
    """What PEFT adds to each adapted module's weight, by module path: [out, in] float32, an embedding's too."""
    found: dict[str, Tensor] = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, peft.tuners.lora.Linear):
            found[name] = module.get_delta_weight("default").detach().float()
        elif isinstance(module, peft.tuners.lora.Embedding):
            found[name] = module.get_delta_weight("default").detach().float().t()
    return found


def write_folder(
    folder: Path,
    tensors: Mapping[str, Tensor],
    weights_file: str = "adapter_model.safetensors",
    **fields: Any,
) -> Path:
    """Write a PEFT folder by hand: `fields` over a plain LoRA configuration, None removing one."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        "bias": "none",
    } | fields
    kept = {field: value for field, value in config.items() if value is not None}
    (folder / "adapter_config.json").write_text(json.dumps(kept))
    safetensors.torch.save_file(dict(tensors), folder / weights_file)
    return folder


def random_tensors(
    base: BaseShape, rank: int, seed: int, sites: Sequence[str] = SITES, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """A and B of every layer at `sites`, or once of those outside the layers, named as PEFT names them."""
    rng = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for layer in range(base.num_layers):
        for site in sites:
            if layer and site in OUTER_SITES:
                continue
            shape, path = base.of(site), f"base_model.model.{module_path(layer, site)}"
            A, B = (
                f"{path}.lora_embedding_{side}" if site == "embed_tokens" else f"{path}.lora_{side}.weight"
                for side in "AB"
            )
            tensors[A] = (torch.randn(rank, shape.in_features, generator=rng) * 0.1).to(dtype)
            tensors[B] = (torch.randn(shape.out_features, rank, generator=rng) * 0.1).to(dtype)
    return tensors


def write_adapter(
    folder: Path, base: BaseShape, rank: int, seed: int, sites: Sequence[str] = SITES, **fields: Any
) -> Path:
    """A well-formed random adapter of one rank."""
    defaults = {"r": rank, "lora_alpha": 2 * rank, "target_modules": list(sites)}
    return write_folder(folder, random_tensors(base, rank, seed, sites), **(defaults | fields))
