"""Reading config.json in both of its styles, and refusing by name what would change the arithmetic."""

from typing import Any

import pytest
import transformers

from lora.target_modules import SITES, SiteGroup
from model.config import ModelConfig, UnsupportedModel
from model.config_file import parse_config

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOWED = {"use_sliding_window": True, "sliding_window": 7}
ALTERNATING = ["full_attention", "sliding_attention"] * 2


def parse(**fields: Any) -> ModelConfig:
    return parse_config({**LLAMA, **fields}, {})


def test_sizes_are_read_or_derived() -> None:
    config = parse()
    assert (config.head_dim, config.q_size, config.kv_size) == (8, 64, 16)
    assert (config.max_model_len, config.dtype, config.bos_token_id) == (1024, "bfloat16", 1)
    assert parse(head_dim=32).q_size == 256
    assert parse(num_key_value_heads=None).num_kv_heads == 8
    assert parse(torch_dtype=None, dtype="float16").dtype == "float16"


def test_the_end_tokens_are_generations_own_or_else_the_models() -> None:
    assert parse().eos_token_ids == (2,)
    assert parse(eos_token_id=[5, 6]).eos_token_ids == (5, 6)
    assert parse(eos_token_id=None).eos_token_ids == ()
    assert parse_config(LLAMA, {"eos_token_id": [7, 2]}).eos_token_ids == (7, 2)


def test_end_tokens_that_cannot_be_drawn_are_left_out() -> None:
    assert parse(eos_token_id=[-1, 2, 128]).eos_token_ids == (2,)


def test_the_dtypes_name_may_be_torchs() -> None:
    assert parse(torch_dtype="torch.bfloat16").dtype == "bfloat16"


@pytest.mark.parametrize("absent", [None, []])
def test_without_architectures_the_model_type_says_the_family(absent: object) -> None:
    assert parse(architectures=absent, model_type="qwen3", head_dim=8).architecture == "Qwen3ForCausalLM"


@pytest.mark.parametrize(
    "family", [transformers.MistralConfig, transformers.Qwen2Config, transformers.Qwen3Config]
)
def test_fields_that_are_left_out_have_transformers_values(family: type[Any]) -> None:
    absent = ("max_position_embeddings", "num_key_value_heads", "architectures")
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 32, "hidden_size": 2048}
    raw = {name: value for name, value in LLAMA.items() if name not in absent}
    ours, theirs = parse_config({**raw, **sizes, "model_type": family.model_type}, {}), family(**sizes)
    assert ours.max_model_len == theirs.max_position_embeddings
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.windows[0] == theirs.sliding_window
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 64)


def test_both_styles_of_rope_fields_say_the_same() -> None:
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    }
    older = parse(rope_theta=500000.0, rope_scaling=llama3).rope
    newer = parse(rope_parameters={**llama3, "rope_theta": 500000.0}).rope
    assert older == newer
    assert (older.kind, older.theta, older.original_max_tokens) == ("llama3", 500000.0, 256)
    assert parse(rope_scaling={"type": "linear", "factor": 2.0}).rope.kind == "linear"
    assert parse(rope_scaling=None).rope.kind == "default"


def test_linear_and_dynamic_ropes_stretch_the_context() -> None:
    assert parse(rope_scaling={"type": "linear", "factor": 2.5}).max_model_len == 2560
    assert parse(rope_scaling={"type": "dynamic", "factor": 2.0}).max_model_len == 2048


@pytest.mark.parametrize(
    ("architecture", "fields", "windows"),
    [
        ("LlamaForCausalLM", {}, (None, None, None, None)),
        ("MistralForCausalLM", {"sliding_window": 7}, (7, 7, 7, 7)),
        ("MistralForCausalLM", {"sliding_window": None}, (None, None, None, None)),
        ("Qwen2ForCausalLM", {"use_sliding_window": False, "sliding_window": 7}, (None, None, None, None)),
        ("Qwen2ForCausalLM", {**WINDOWED, "max_window_layers": 3}, (None, None, None, 7)),
        ("Qwen3ForCausalLM", {**WINDOWED, "layer_types": ALTERNATING}, (None, 7, None, 7)),
    ],
)
def test_windows_by_layer(architecture: str, fields: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert parse(architectures=[architecture], **fields).windows == windows


def test_biases_and_norms_by_family() -> None:
    def facts(architecture: str, **fields: Any) -> tuple[bool, bool, bool, bool]:
        config = parse(architectures=[architecture], **fields)
        return config.qkv_bias, config.out_bias, config.mlp_bias, config.qk_norm

    assert facts("LlamaForCausalLM") == (False, False, False, False)
    assert facts("LlamaForCausalLM", attention_bias=True, mlp_bias=True) == (True, True, True, False)
    assert facts("MistralForCausalLM") == (False, False, False, False)
    assert facts("Qwen2ForCausalLM") == (True, False, False, False)
    assert facts("Qwen3ForCausalLM") == (False, False, False, True)


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("architectures", {"architectures": ["GemmaForCausalLM"]}),
        ("architectures", {"architectures": None}),
        ("architectures", {"architectures": None, "model_type": "gemma"}),
        ("architectures", {"architectures": "LlamaForCausalLM"}),
        ("model_type", {"model_type": "qwen2"}),
        ("num_hidden_layers", {"num_hidden_layers": 10**30}),
        ("num_attention_heads", {"num_attention_heads": "8"}),
        ("rms_norm_eps", {"rms_norm_eps": float("nan")}),
        ("rms_norm_eps", {"rms_norm_eps": "1e-5"}),
        ("rope_theta", {"rope_theta": float("nan")}),
        ("rope_theta", {"rope_theta": float("inf")}),
        ("rope_theta", {"rope_theta": 0}),
        ("rope_theta", {"rope_parameters": {"rope_type": "default", "rope_theta": "high"}}),
        ("rope_scaling", {"rope_scaling": "linear"}),
        ("rope_scaling", {"rope_scaling": ["linear", 2.0]}),
        ("rope factor", {"rope_scaling": {"type": "linear", "factor": float("inf")}}),
        ("head_dim", {"head_dim": 2, "rope_scaling": {"type": "dynamic", "factor": 2.0}}),
        ("eos_token_id", {"eos_token_id": "</s>"}),
        ("eos_token_id", {"eos_token_id": [2, "</s>"]}),
        ("tie_word_embeddings", {"tie_word_embeddings": "false"}),
        ("attention_bias", {"attention_bias": "false"}),
        ("max_window_layers", {"architectures": ["Qwen2ForCausalLM"], **WINDOWED, "max_window_layers": None}),
        ("hidden_act", {"hidden_act": "gelu"}),
        ("quantization_config", {"quantization_config": {"quant_method": "gptq"}}),
        ("rope_type", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
        ("rope_type", {"rope_parameters": {"rope_type": "longrope", "factor": 4.0}}),
        ("rope_parameters", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}),
        ("rope factor", {"rope_scaling": {"type": "linear"}}),
        ("partial_rotary_factor", {"partial_rotary_factor": 0.5}),
        (
            "partial_rotary_factor",
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        ),
        ("final_logit_softcapping", {"final_logit_softcapping": 30.0}),
        ("num_local_experts", {"num_local_experts": 8}),
        ("vocab_size", {"vocab_size": None}),
        ("num_key_value_heads", {"num_key_value_heads": 3}),
        ("hidden_size", {"hidden_size": 63}),
        ("head_dim", {"head_dim": 7}),
        ("dtype", {"torch_dtype": "float8_e4m3fn"}),
        ("layer_types", {"layer_types": ["chunked_attention"] * 4}),
        (
            "layer_types",
            {"architectures": ["Qwen2ForCausalLM"], **WINDOWED, "layer_types": ["full_attention"]},
        ),
    ],
)
def test_what_is_not_served_is_refused_by_name(field: str, fields: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel) as error:
        parse(**fields)
    assert error.value.field == field
    assert field in str(error.value)
    assert error.value.remedy in str(error.value)


def test_base_shape_is_what_peft_sees() -> None:
    shape = parse().base_shape()
    sizes = {site: (shape.of(site).in_features, shape.of(site).out_features) for site in SITES}
    assert sizes == {
        "q_proj": (64, 64),
        "k_proj": (64, 16),
        "v_proj": (64, 16),
        "o_proj": (64, 64),
        "gate_proj": (64, 160),
        "up_proj": (64, 160),
        "down_proj": (160, 64),
    }
    assert (shape.num_layers, shape.group_out(SiteGroup.QKV)) == (4, 96)
