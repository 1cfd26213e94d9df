"""Read a checkpoint's config.json into a ModelConfig, and refuse by name what the forward pass cannot honour.

It knows no tensor's content.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from model.config import ModelConfig, RopeConfig, UnsupportedModel


@dataclass(frozen=True, slots=True)
class _Family:
    """What an architecture's name implies beyond its config's fields; None means that the field decides."""

    qkv_bias: bool | None
    out_bias: bool | None
    mlp_bias: bool | None
    qk_norm: bool
    window: str  # "none", "all" layers, or "by layer"


_FAMILIES: Mapping[str, _Family] = {
    "LlamaForCausalLM": _Family(None, None, None, qk_norm=False, window="none"),
    "MistralForCausalLM": _Family(False, False, False, qk_norm=False, window="all"),
    "Qwen2ForCausalLM": _Family(True, False, False, qk_norm=False, window="by layer"),
    "Qwen3ForCausalLM": _Family(None, None, False, qk_norm=True, window="by layer"),
}

# Fields that change the arithmetic in other families, with the values under which they change nothing.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "hidden_act": ("silu", "swish"),
    "quantization_config": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logit_scale": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "attention_multiplier": (None,),
    "query_pre_attn_scalar": (None,),
    "partial_rotary_factor": (None, 1, 1.0),
    "clip_qkv": (None,),
    "no_rope_layers": (None, []),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "attention_chunk_size": (None,),
}

_ROPE_KINDS = ("default", "linear", "dynamic", "llama3")
_DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def parse_config(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
    """Read config.json and generation_config.json, in the style of transformers 4 or 5. Raises UnsupportedModel."""
    architecture, family = _family(raw)
    _refuse_altered_arithmetic(raw)
    num_layers, num_heads = _integer(raw, "num_hidden_layers"), _integer(raw, "num_attention_heads")
    rope = _rope(raw)
    return ModelConfig(
        architecture=architecture,
        vocab_size=_integer(raw, "vocab_size"),
        hidden_size=_integer(raw, "hidden_size"),
        intermediate_size=_integer(raw, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=_kv_heads(raw, num_heads),
        head_dim=_head_dim(raw, num_heads),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope=rope,
        windows=_windows(raw, family, num_layers),
        qkv_bias=_bias(raw, "attention_bias", family.qkv_bias),
        out_bias=_bias(raw, "attention_bias", family.out_bias),
        mlp_bias=_bias(raw, "mlp_bias", family.mlp_bias),
        qk_norm=family.qk_norm,
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        max_model_len=_max_model_len(raw, rope),
        dtype=_dtype(raw),
        bos_token_id=raw.get("bos_token_id"),
        eos_token_ids=_token_ids(generation.get("eos_token_id", raw.get("eos_token_id"))),
    )


def _family(raw: Mapping[str, Any]) -> tuple[str, _Family]:
    names: list[Any] = raw.get("architectures") or []
    if len(names) != 1 or names[0] not in _FAMILIES:
        raise UnsupportedModel("architectures", names, f"serve one of {', '.join(_FAMILIES)}")
    return names[0], _FAMILIES[names[0]]


def _refuse_altered_arithmetic(raw: Mapping[str, Any]) -> None:
    for field, neutral in _NEUTRAL.items():
        if field in raw and raw[field] not in neutral:
            raise UnsupportedModel(field, raw[field], f"only {neutral[0]!r} is implemented")


def _integer(raw: Mapping[str, Any], field: str) -> int:
    value = raw.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UnsupportedModel(field, value, "config.json must give a positive integer")
    return value


def _kv_heads(raw: Mapping[str, Any], num_heads: int) -> int:
    if raw.get("num_key_value_heads") is None:
        return num_heads
    kv_heads = _integer(raw, "num_key_value_heads")
    if num_heads % kv_heads:
        raise UnsupportedModel(
            "num_key_value_heads", kv_heads, f"it must divide num_attention_heads={num_heads}"
        )
    return kv_heads


def _head_dim(raw: Mapping[str, Any], num_heads: int) -> int:
    derived = raw.get("head_dim") is None
    if derived and _integer(raw, "hidden_size") % num_heads:
        remedy = f"give head_dim, or a multiple of num_attention_heads={num_heads}"
        raise UnsupportedModel("hidden_size", raw["hidden_size"], remedy)
    head_dim = _integer(raw, "hidden_size") // num_heads if derived else _integer(raw, "head_dim")
    if head_dim % 2:
        raise UnsupportedModel("head_dim", head_dim, "rotary embedding needs an even number")
    return head_dim


def _bias(raw: Mapping[str, Any], field: str, implied: bool | None) -> bool:
    return bool(raw.get(field, False)) if implied is None else implied


def _windows(raw: Mapping[str, Any], family: _Family, num_layers: int) -> tuple[int | None, ...]:
    everywhere: tuple[int | None, ...] = (None,) * num_layers
    if family.window == "none":
        _expect_layer_types(raw, "full_attention")
        return everywhere
    if family.window == "all":
        window = raw.get("sliding_window")
        _expect_layer_types(raw, "full_attention" if window is None else "sliding_attention")
        return everywhere if window is None else (_integer(raw, "sliding_window"),) * num_layers
    if not raw.get("use_sliding_window") or raw.get("sliding_window") is None:
        return everywhere
    window = _integer(raw, "sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in _layer_types(raw, num_layers))


def _expect_layer_types(raw: Mapping[str, Any], kind: str) -> None:
    if set(raw.get("layer_types") or [kind]) != {kind}:
        raise UnsupportedModel(
            "layer_types", raw["layer_types"], f"this architecture has only {kind!r} layers"
        )


def _layer_types(raw: Mapping[str, Any], num_layers: int) -> list[str]:
    first_window = raw.get("max_window_layers", num_layers)
    kinds = raw.get("layer_types") or [
        "sliding_attention" if layer >= first_window else "full_attention" for layer in range(num_layers)
    ]
    if len(kinds) != num_layers or not set(kinds) <= {"sliding_attention", "full_attention"}:
        remedy = f"give {num_layers} of 'sliding_attention' or 'full_attention'"
        raise UnsupportedModel("layer_types", kinds, remedy)
    return kinds


def _rope(raw: Mapping[str, Any]) -> RopeConfig:
    """Older files say rope_theta and rope_scaling, newer ones put both into rope_parameters."""
    rope: Mapping[str, Any] = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    kind = _rope_kind(rope)
    longest = _max_positions(raw)
    original = raw.get(
        "original_max_position_embeddings", rope.get("original_max_position_embeddings", longest)
    )
    scaled, banded = kind != "default", kind == "llama3"
    return RopeConfig(
        kind=kind,
        theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10_000.0),
        factor=_rope_number(rope, "factor") if scaled else 1.0,
        original_max_tokens=original if banded else longest,
        low_freq_factor=_rope_number(rope, "low_freq_factor") if banded else 1.0,
        high_freq_factor=_rope_number(rope, "high_freq_factor") if banded else 4.0,
    )


def _rope_kind(rope: Mapping[str, Any]) -> str:
    if any(isinstance(value, dict) for value in rope.values()):
        raise UnsupportedModel("rope_parameters", dict(rope), "give one rope for all layers")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModel(
            "partial_rotary_factor", rope["partial_rotary_factor"], "only 1.0 is implemented"
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _ROPE_KINDS:
        raise UnsupportedModel("rope_type", kind, f"use one of {', '.join(_ROPE_KINDS)}")
    return kind


def _rope_number(rope: Mapping[str, Any], field: str) -> float:
    value = rope.get(field)
    if not isinstance(value, int | float) or value <= 0:
        raise UnsupportedModel(
            f"rope {field}", value, f"rope type {rope.get('rope_type')!r} needs a number above 0"
        )
    return float(value)


def _max_positions(raw: Mapping[str, Any]) -> int:
    return _integer(raw, "max_position_embeddings") if "max_position_embeddings" in raw else 2048


def _max_model_len(raw: Mapping[str, Any], rope: RopeConfig) -> int:
    """Linear and dynamic scaling state the unscaled length and stretch it by their factor."""
    stretch = rope.factor if rope.kind in ("linear", "dynamic") else 1.0
    return int(_max_positions(raw) * stretch)


def _dtype(raw: Mapping[str, Any]) -> torch.dtype:
    name = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    if name not in _DTYPES:
        raise UnsupportedModel("dtype", name, f"use one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)
