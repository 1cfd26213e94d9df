"""Read a checkpoint's config.json into a ModelConfig, and refuse by name what the forward pass cannot honour.

It knows no tensor's content.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from model.config import ModelConfig, RopeConfig, UnsupportedModel
from model.config_fields import read_dtype, read_flag, read_integer, read_number, read_token_ids


@dataclass(frozen=True, slots=True)
class _Family:
    """What an architecture's name implies beyond its config's fields; None means that the field decides.

    `defaults` are the values of fields that config.json leaves out, as in transformers.
    """

    model_type: str
    qkv_bias: bool | None
    out_bias: bool | None
    mlp_bias: bool | None
    qk_norm: bool
    window: str  # "none", "all" layers, or "by layer"
    defaults: Mapping[str, object]


_QWEN_DEFAULTS = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_FAMILIES: Mapping[str, _Family] = {
    "LlamaForCausalLM": _Family(
        "llama", None, None, None, qk_norm=False, window="none", defaults={"max_position_embeddings": 2048}
    ),
    "MistralForCausalLM": _Family(
        "mistral",
        False,
        False,
        False,
        qk_norm=False,
        window="all",
        defaults={"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "Qwen2ForCausalLM": _Family(
        "qwen2", True, False, False, qk_norm=False, window="by layer", defaults=_QWEN_DEFAULTS
    ),
    "Qwen3ForCausalLM": _Family(
        "qwen3",
        None,
        None,
        False,
        qk_norm=True,
        window="by layer",
        defaults={**_QWEN_DEFAULTS, "head_dim": 128},
    ),
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
_MOST_PARTS = 1 << 14  # layers, or heads of a layer; more is no model but a slip in the file
_MOST_STRETCH = 1e6  # of a rope


def parse_config(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
    """Read config.json and generation_config.json, in the style of transformers 4 or 5. Raises UnsupportedModel."""
    architecture, family = _family(raw)
    raw = {**family.defaults, **raw}
    _refuse_altered_arithmetic(raw)
    num_layers = read_integer(raw, "num_hidden_layers", _MOST_PARTS)
    num_heads = read_integer(raw, "num_attention_heads", _MOST_PARTS)
    rope, vocab_size = _rope(raw), read_integer(raw, "vocab_size")
    ends = raw if generation.get("eos_token_id") is None else generation
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=read_integer(raw, "hidden_size"),
        intermediate_size=read_integer(raw, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=_kv_heads(raw, num_heads),
        head_dim=_head_dim(raw, num_heads, rope.kind),
        rms_norm_eps=read_number("rms_norm_eps", raw.get("rms_norm_eps", 1e-6), zero=True),
        rope=rope,
        windows=_windows(raw, family, num_layers),
        qkv_bias=_bias(raw, "attention_bias", family.qkv_bias),
        out_bias=_bias(raw, "attention_bias", family.out_bias),
        mlp_bias=_bias(raw, "mlp_bias", family.mlp_bias),
        qk_norm=family.qk_norm,
        tied_embeddings=read_flag(raw, "tie_word_embeddings"),
        max_model_len=_max_model_len(raw, rope),
        dtype=read_dtype(raw),
        bos_token_id=next(iter(read_token_ids(raw, "bos_token_id", vocab_size)), None),
        eos_token_ids=read_token_ids(ends, "eos_token_id", vocab_size),
    )


def _family(raw: Mapping[str, Any]) -> tuple[str, _Family]:
    """Find the family that `architectures` names or, where that is left out, `model_type`."""
    given: Any = raw.get("architectures") or []
    is_list = isinstance(given, list)
    names = cast(list[Any], given if is_list else [given])
    model_type = raw.get("model_type")
    if not names and isinstance(model_type, str):
        names = [name for name, family in _FAMILIES.items() if family.model_type == model_type]
    family = _FAMILIES.get(str(names[0])) if is_list and len(names) == 1 else None
    if family is None:
        raise UnsupportedModel("architectures", names, f"serve one of {', '.join(_FAMILIES)}")
    if model_type not in (None, family.model_type):
        raise UnsupportedModel("model_type", model_type, f"{names[0]} is of type {family.model_type!r}")
    return str(names[0]), family


def _refuse_altered_arithmetic(raw: Mapping[str, Any]) -> None:
    for field, neutral in _NEUTRAL.items():
        if field in raw and raw[field] not in neutral:
            raise UnsupportedModel(field, raw[field], f"only {neutral[0]!r} is implemented")


def _kv_heads(raw: Mapping[str, Any], num_heads: int) -> int:
    if raw.get("num_key_value_heads") is None:
        return num_heads
    kv_heads = read_integer(raw, "num_key_value_heads")
    if num_heads % kv_heads:
        raise UnsupportedModel(
            "num_key_value_heads", kv_heads, f"it must divide num_attention_heads={num_heads}"
        )
    return kv_heads


def _head_dim(raw: Mapping[str, Any], num_heads: int, rope_kind: str) -> int:
    derived = raw.get("head_dim") is None
    if derived and read_integer(raw, "hidden_size") % num_heads:
        remedy = f"give head_dim, or a multiple of num_attention_heads={num_heads}"
        raise UnsupportedModel("hidden_size", raw["hidden_size"], remedy)
    head_dim = read_integer(raw, "hidden_size") // num_heads if derived else read_integer(raw, "head_dim")
    if head_dim % 2 or (head_dim == 2 and rope_kind == "dynamic"):
        raise UnsupportedModel(
            "head_dim", head_dim, "rotary embedding needs an even number, above 2 if dynamic"
        )
    return head_dim


def _bias(raw: Mapping[str, Any], field: str, implied: bool | None) -> bool:
    return read_flag(raw, field) if implied is None else implied


def _windows(raw: Mapping[str, Any], family: _Family, num_layers: int) -> tuple[int | None, ...]:
    everywhere: tuple[int | None, ...] = (None,) * num_layers
    if family.window == "none":
        _expect_layer_types(raw, "full_attention")
        return everywhere
    if family.window == "all":
        window = raw.get("sliding_window")
        _expect_layer_types(raw, "full_attention" if window is None else "sliding_attention")
        return everywhere if window is None else (read_integer(raw, "sliding_window"),) * num_layers
    if not read_flag(raw, "use_sliding_window") or raw.get("sliding_window") is None:
        return everywhere
    window = read_integer(raw, "sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in _layer_types(raw, num_layers))


def _expect_layer_types(raw: Mapping[str, Any], kind: str) -> None:
    kinds: Any = raw.get("layer_types") or [kind]
    if not isinstance(kinds, list) or any(each != kind for each in cast(list[Any], kinds)):
        raise UnsupportedModel(
            "layer_types", raw["layer_types"], f"this architecture has only {kind!r} layers"
        )


def _layer_types(raw: Mapping[str, Any], num_layers: int) -> list[str]:
    known = ("sliding_attention", "full_attention")
    kinds = raw.get("layer_types")
    if not kinds:
        first_window = raw.get("max_window_layers")
        if not isinstance(first_window, int):
            raise UnsupportedModel("max_window_layers", first_window, "config.json must give an integer")
        return [known[layer < first_window] for layer in range(num_layers)]
    named = cast(list[Any], kinds) if isinstance(kinds, list) else []
    if len(named) != num_layers or any(kind not in known for kind in named):
        raise UnsupportedModel(
            "layer_types", raw["layer_types"], f"give {num_layers} of {known[0]!r} or {known[1]!r}"
        )
    return named


def _rope(raw: Mapping[str, Any]) -> RopeConfig:
    """Older files say rope_theta and rope_scaling, newer ones put both into rope_parameters."""
    field = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    given: Any = raw.get(field) or {}
    if not isinstance(given, dict):
        raise UnsupportedModel(field, given, "config.json must give an object, or null")
    rope = cast(dict[str, Any], given)
    kind = _rope_kind(rope)
    longest = read_integer(raw, "max_position_embeddings")
    scaled, banded = kind != "default", kind == "llama3"
    original = "original_max_position_embeddings"
    low = _rope_number(rope, "low_freq_factor") if banded else 1.0
    high = _rope_number(rope, "high_freq_factor") if banded else 4.0
    if high <= low:
        raise UnsupportedModel("rope high_freq_factor", high, f"it must be above low_freq_factor={low}")
    theta = rope.get("rope_theta", raw.get("rope_theta"))
    return RopeConfig(
        kind=kind,
        theta=10_000.0 if theta is None else read_number("rope_theta", theta),
        factor=_rope_number(rope, "factor") if scaled else 1.0,
        original_max_tokens=read_integer({original: longest, **rope, **raw}, original) if banded else longest,
        low_freq_factor=low,
        high_freq_factor=high,
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
    return read_number(f"rope {field}", rope.get(field), _MOST_STRETCH)


def _max_model_len(raw: Mapping[str, Any], rope: RopeConfig) -> int:
    """Linear and dynamic scaling state the unscaled length and stretch it by their factor."""
    stretch = rope.factor if rope.kind in ("linear", "dynamic") else 1.0
    return int(read_integer(raw, "max_position_embeddings") * stretch)
