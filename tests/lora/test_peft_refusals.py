"""What is not served is refused, and the reason names the file, the field or tensor, and the value."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from torch import Tensor

from lora.errors import AdapterRefused
from lora.format.peft import PackedAdapter, pack
from lora.format.peft_config import HONOURED, IRRELEVANT, REFUSED
from tests.oracles.adapters import base_shape, random_tensors, write_folder

BASE = base_shape()
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
Tensors = dict[str, Tensor]


def q_tensors() -> Tensors:
    return random_tensors(BASE, 4, seed=1, sites=["q_proj"])


def pack_it(folder: Path, dtype: torch.dtype = torch.float32) -> PackedAdapter:
    return pack("adapter-x", folder, BASE, dtype)


def assert_refused(folder: Path, reason: str, dtype: torch.dtype = torch.float32) -> None:
    with pytest.raises(AdapterRefused, match=reason) as refusal:
        pack_it(folder, dtype)
    assert refusal.value.name == "adapter-x"
    assert "'adapter-x'" in str(refusal.value)


def test_the_plain_folder_is_served(tmp_path: Path) -> None:
    assert pack_it(write_folder(tmp_path, q_tensors())).ref.sites == ("q_proj",)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, r"use_dora=True: DoRA"),
    "modules to save": ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
    "bias": ({"bias": "lora_only"}, r"bias='lora_only'"),
    "lora bias": ({"lora_bias": True}, r"lora_bias=True"),
    "trainable tokens": ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices=\[1, 2\]"),
    "layer replication": ({"layer_replication": [[0, 2], [1, 3]]}, r"layer_replication="),
    "transposed": ({"fan_in_fan_out": True}, r"fan_in_fan_out=True"),
    "megatron": ({"megatron_config": {"a": 1}}, r"megatron_config="),
    "alora": ({"alora_invocation_tokens": []}, r"alora_invocation_tokens=\[\]"),
    "qalora": ({"use_qalora": True}, r"use_qalora=True"),
    "parameters": ({"target_parameters": ["experts.w"]}, r"target_parameters="),
    "other method": ({"peft_type": "IA3"}, r"peft_type='IA3'"),
    "adalora": ({"peft_type": "ADALORA"}, r"peft_type='ADALORA'"),
    "no method": ({"peft_type": None}, r"peft_type=None"),
    "pissa": (
        {"init_lora_weights": "pissa_niter_16"},
        r"'pissa_niter_16'.*path_initial_model_for_weight_conversion",
    ),
    "olora": ({"init_lora_weights": "olora"}, r"'olora'.*changed the base weights"),
    "corda": ({"init_lora_weights": "corda"}, r"'corda'"),
    "loftq": ({"init_lora_weights": "loftq"}, r"'loftq'"),
    "unknown init": (
        {"init_lora_weights": "zen"},
        r"init_lora_weights='zen', which this version does not know",
    ),
    "unknown field": ({"use_warp": 3}, r"use_warp=3, a field that this version does not know"),
    "no alpha": ({"lora_alpha": None}, r"lora_alpha=None"),
    "no rank": ({"r": None}, r"r=None: a rank is a whole number"),
    "rank 0": ({"r": 0}, r"r=0"),
    "rank of a fraction": ({"r": 4.5}, r"r=4\.5"),
    "alpha of text": ({"lora_alpha": "8"}, r"lora_alpha='8'"),
    "alpha not finite": ({"lora_alpha": float("nan")}, r"lora_alpha=nan"),
    "pattern rank 0": ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\]=0"),
    "pattern of a list": ({"rank_pattern": ["q_proj"]}, r"rank_pattern=\['q_proj'\]"),
    "rsLoRA of text": ({"use_rslora": "yes"}, r"use_rslora='yes': give true or false"),
    "no targets": ({"target_modules": None}, r"names no target_modules"),
    "targets of a number": ({"target_modules": 7}, r"target_modules=7"),
    "invalid regex": ({"target_modules": "q_proj("}, r"invalid regex 'q_proj\(' in target_modules"),
    "regex that blows up": (
        {"target_modules": r"(.*(\w+)*)*\.(?=x)"},
        r"invalid regex .* in target_modules, or one beyond what is matched",
    ),
    "rank beyond all": ({"r": 10**4000}, r"r=1000.*: a rank is a whole number from 1 to"),
    "alpha beyond all": ({"lora_alpha": 10**4000}, r"lora_alpha=1000.*: give the number"),
    "layer beyond all": ({"layers_to_transform": [10**4000]}, r"layers_to_transform=\[1000"),
    "flags in a pattern": ({"rank_pattern": {"(?i)q_proj": 4}}, r"'\(\?i\)q_proj' in rank_pattern"),
    "many patterns": (
        {"rank_pattern": {f"x{number}": 4 for number in range(5000)}},
        r"5000 patterns in rank_pattern",
    ),
    "long regexes": ({"rank_pattern": {f"x{n}.*": 4 for n in range(2000)}}, r"rank_pattern, .* regexes"),
    "lone surrogate": ({"use_\ud800": True}, r"surrogates not allowed"),
    "regex and layers": (
        {"target_modules": ".*q_proj", "layers_to_transform": [0]},
        r"layers_to_transform with",
    ),
    "negative layer": ({"layers_to_transform": -1}, r"layers_to_transform=-1"),
    "rank disagrees": ({"r": 8}, r"q_proj has rank 4 in lora_A and 4 in lora_B.*say 8"),
    "pattern disagrees": (
        {"rank_pattern": {"layers.1.*": 2}},
        r"layers\.1\.self_attn\.q_proj has rank 4.*say 2",
    ),
    "target without tensors": (
        {"target_modules": ["q_proj", "o_proj"]},
        r"targets model.layers.0.self_attn.o_proj",
    ),
    "layers without tensors": (
        {"target_modules": ".*q_proj|.*1.mlp.up_proj"},
        r"targets model.layers.1.mlp.up_proj",
    ),
    "target unknown": (
        {"target_modules": ["q_proj", "query_key_value"]},
        r"'query_key_value' in target_modules",
    ),
    "head targeted": ({"target_modules": ["q_proj", "lm_head"]}, r"targets lm_head, of which .* no tensors"),
    "embedding targeted": (
        {"target_modules": ["q_proj", "embed_tokens"]},
        r"targets model\.embed_tokens, of which .* no tensors",
    ),
    "tensors untargeted": (
        {"layers_to_transform": [0, 1]},
        r"has model.layers.2.self_attn.q_proj, which .* not target",
    ),
    "excluded": (
        {"exclude_modules": ["layers.1.self_attn.q_proj"]},
        r"model.layers.1.self_attn.q_proj, which",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configurations_that_are_not_served(case: str, tmp_path: Path) -> None:
    fields, reason = CONFIGS[case]
    assert_refused(write_folder(tmp_path, q_tensors(), **fields), reason)


def without(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(name)


def having(name: str, tensor: Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__setitem__(name, tensor)


def filled(value: float) -> Tensor:
    tensor = torch.ones(4, 32)
    tensor[3, 31] = value
    return tensor


TENSORS: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "A alone": (without(f"{Q0}.lora_B.weight"), r"lora_A of model\.layers\.0.* without lora_B"),
    "B alone": (without(f"{Q0}.lora_A.weight"), r"lora_B of model\.layers\.0.* without lora_A"),
    "all gone": (lambda tensors: tensors.clear(), r"holds no tensors"),
    "NaN": (having(f"{Q0}.lora_A.weight", filled(float("nan"))), r"lora_A of model\.layers\.0.*NaN"),
    "Inf": (having(f"{Q0}.lora_A.weight", filled(float("-inf"))), r"lora_A of model\.layers\.0.*Inf"),
    "twice": (
        having(f"{Q0}.lora_A.default.weight", torch.ones(4, 32)),
        r"lora_A of model\.layers\.0.* twice",
    ),
    "wide A": (
        having(f"{Q0}.lora_A.weight", torch.ones(4, 64)),
        r"maps 64 to 32 features, the base model's 32 to 32",
    ),
    "tall B": (
        having(f"{Q0}.lora_B.weight", torch.ones(48, 4)),
        r"maps 32 to 48 features, the base model's 32 to 32",
    ),
    "rank differs": (having(f"{Q0}.lora_B.weight", torch.ones(32, 3)), r"rank 4 in lora_A and 3 in lora_B"),
    "one dimension": (having(f"{Q0}.lora_A.weight", torch.ones(128)), r"shape \(128,\)"),
    "empty": (having(f"{Q0}.lora_A.weight", torch.ones(0, 32)), r"shape \(0, 32\)"),
    "integers": (
        having(f"{Q0}.lora_A.weight", torch.ones(4, 32, dtype=torch.int8)),
        r"torch\.int8: save it as",
    ),
    "doubles": (
        having(f"{Q0}.lora_A.weight", torch.ones(4, 32, dtype=torch.float64)),
        r"torch\.float64: save it as",
    ),
    "embedding": (
        having("base_model.model.model.embed_tokens.lora_embedding_A", torch.ones(4, 64)),
        r"lora_A of model\.embed_tokens without lora_B",
    ),
    "copied embedding": (
        having("base_model.model.model.embed_tokens.base_layer.weight", torch.ones(64, 32)),
        r"'base_model\.model\.model\.embed_tokens\.base_layer\.weight' .* a new embed_tokens is not served",
    ),
    "new embedding": (
        having("base_model.model.model.embed_tokens.weight", torch.ones(64, 32)),
        r"embed_tokens\.weight'.* a new embedding is not served",
    ),
    "head": (having("base_model.model.lm_head.lora_A.weight", torch.ones(4, 32)), r"lm_head without lora_B"),
    "new head": (
        having("base_model.model.lm_head.weight", torch.ones(64, 32)),
        r"a new lm_head is not served",
    ),
    "copied head": (
        having("base_model.model.lm_head.base_layer.weight", torch.ones(64, 32)),
        r"'base_model\.model\.lm_head\.base_layer\.weight' .* a new lm_head is not served",
    ),
    "magnitude": (having(f"{Q0}.lora_magnitude_vector", torch.ones(32)), r"belongs to DoRA"),
    "bias tensor": (having(f"{Q0}.lora_B.bias", torch.ones(32)), r"biases are not served"),
    "unknown": (having("something.else", torch.ones(2)), r"'something\.else', which is no LoRA of a Llama"),
    "fused": (
        having("base_model.model.model.layers.0.self_attn.qkv_proj.lora_A.weight", torch.ones(4, 32)),
        r"self_attn\.qkv_proj is no served module",
    ),
    "misplaced": (
        having("base_model.model.model.layers.0.mlp.q_proj.lora_A.weight", torch.ones(4, 32)),
        r"mlp\.q_proj is no served module",
    ),
    "two roots": (
        having("base_model.model.layers.0.self_attn.q_proj.lora_A.weight", torch.ones(4, 32)),
        r"different roots \['', 'model\.'\]",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_are_not_served(case: str, tmp_path: Path) -> None:
    change, reason = TENSORS[case]
    tensors = q_tensors()
    change(tensors)
    assert_refused(write_folder(tmp_path, tensors), reason)


def with_embedding(vocab: int = 64) -> Tensors:
    path = "base_model.model.model.embed_tokens.lora_embedding_"
    return q_tensors() | {f"{path}A": torch.ones(4, vocab), f"{path}B": torch.ones(32, 4)}


def test_an_embedding_of_another_vocabulary(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, with_embedding(70), target_modules=["q_proj", "embed_tokens"])
    assert_refused(folder, r"model\.embed_tokens maps 70 to 32 features, the base model's 64 to 32")


def test_a_copied_embedding_of_another_vocabulary(tmp_path: Path) -> None:
    tensors = with_embedding() | {"base_model.model.model.embed_tokens.base_layer.weight": torch.ones(32, 64)}
    folder = write_folder(tmp_path, tensors, target_modules=["q_proj", "embed_tokens"])
    assert_refused(folder, r"of shape \(32, 64\): .* of shape \(64, 32\), is passed over")


def test_an_activated_lora_on_the_embedding(tmp_path: Path) -> None:
    fields = {"target_modules": ["q_proj", "embed_tokens"], "alora_invocation_tokens": [1, 2]}
    folder = write_folder(tmp_path, with_embedding(), **fields)
    assert_refused(folder, r"an activated LoRA on the embedding is not served; train without embed_tokens")


def test_a_tied_head_that_nothing_ties(tmp_path: Path) -> None:
    tensors = with_embedding() | {"base_model.model.lm_head.lora_A.weight": torch.ones(4, 32)}
    tensors |= {"base_model.model.lm_head.lora_B.weight": torch.ones(64, 4)}
    targets = ["q_proj", "embed_tokens"]
    assert_refused(
        write_folder(tmp_path / "a", tensors, target_modules=targets), r"has lm_head, which .* not target"
    )
    tied = write_folder(tmp_path / "b", tensors, target_modules=targets, ensure_weight_tying=True)
    assert pack_it(tied).ref.sites == ("q_proj", "lm_head", "embed_tokens")


def test_an_embedding_whose_update_overflows(tmp_path: Path) -> None:
    """It is judged by a single token's column, not by a sum over the vocabulary."""
    tensors = with_embedding()
    fields = {"target_modules": ["q_proj", "embed_tokens"], "alpha_pattern": {"embed_tokens": 4e4}}
    folder = write_folder(tmp_path / "a", tensors, **fields)  # 4 ranks of 10,000 each
    assert pack_it(folder, torch.float16)
    fields["alpha_pattern"] = {"embed_tokens": 8e4}
    assert_refused(
        write_folder(tmp_path / "b", tensors, **fields),
        r"model\.embed_tokens changes .* about 8e\+04",
        torch.float16,
    )


def test_a_layer_beyond_the_model(tmp_path: Path) -> None:
    tensors = q_tensors() | {f"{Q0.replace('.0.', '.3.')}.lora_{s}.weight": torch.ones(4, 32) for s in "A"}
    tensors |= {f"{Q0.replace('.0.', '.3.')}.lora_B.weight": torch.ones(32, 4)}
    assert_refused(write_folder(tmp_path, tensors), r"layers\.3\..* beyond the base model's 3 layers")


def test_values_beyond_the_serving_dtype(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, q_tensors() | {f"{Q0}.lora_A.weight": filled(1e6)})
    assert_refused(folder, r"beyond torch\.float16's range", torch.float16)
    assert pack_it(folder).ref.rank == 4


def test_a_huge_sum_of_sound_values_is_served(tmp_path: Path) -> None:
    tensors = q_tensors() | {f"{Q0}.lora_A.weight": torch.full((4, 32), 1e37)}
    tensors[f"{Q0}.lora_B.weight"] *= 1e-37
    assert pack_it(write_folder(tmp_path, tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    ("factor", "fields"),
    [(1.0, {"lora_alpha": 1e30}), (1e30, {}), (1e30, {"lora_alpha": 1e-9}), (1.0, {"lora_alpha": -1e22})],
)
def test_an_update_that_can_only_overflow(
    factor: float, fields: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    tensors = {name: tensor * factor for name, tensor in q_tensors().items()}
    folder = write_folder(tmp_path, tensors, **fields)
    assert_refused(folder, r"q_proj changes ordinary inputs|lora_alpha=", dtype)


def test_an_update_beyond_float16_is_served_in_float32(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, q_tensors(), lora_alpha=1e8)
    assert_refused(folder, r"changes ordinary inputs .* beyond what torch\.float16", torch.float16)
    assert pack_it(folder)


def replaced(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def bind_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as own:
        own.bind(str(path))


def write_header(folder: Path, header: bytes) -> None:
    (folder / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda p: p.rename(p.with_name("gone")), r"not a folder"),
    "no configuration": (lambda p: (p / "adapter_config.json").unlink(), r"has no adapter_config\.json"),
    "no JSON": (lambda p: (p / "adapter_config.json").write_text("{"), r"not valid JSON"),
    "no text": (lambda p: (p / "adapter_config.json").write_bytes(b"\xff\xfe\x00"), r"not valid JSON"),
    "a field twice": (
        lambda p: (p / "adapter_config.json").write_text('{"r": 4, "r": 8}'),
        r"has the field 'r' twice",
    ),
    "nested": (
        lambda p: (p / "adapter_config.json").write_text('{"x": ' + "[" * 50 + "]" * 50 + "}"),
        r"nested deeper than 32",
    ),
    "nested beyond all": (
        lambda p: (p / "adapter_config.json").write_text("[" * 400_000),
        r"nested deeper than 32",
    ),
    "digits beyond all": (
        lambda p: (p / "adapter_config.json").write_text('{"r": ' + "9" * 9999 + "}"),
        r"not valid JSON",
    ),
    "a huge configuration": (
        lambda p: (p / "adapter_config.json").write_text(" " * (1 << 20) + "{}"),
        r"1048578 bytes, at most 1048576",
    ),
    "a list": (lambda p: (p / "adapter_config.json").write_text("[]"), r"holds list, not an object"),
    "no weights": (
        lambda p: (p / "adapter_model.safetensors").unlink(),
        r"has no adapter_model\.safetensors",
    ),
    "pickle": (
        lambda p: (p / "adapter_model.safetensors").rename(p / "adapter_model.bin"),
        r"has adapter_model\.bin, a pickle",
    ),
    "empty weights": (lambda p: (p / "adapter_model.safetensors").write_bytes(b""), r"truncated"),
    "no safetensors": (
        lambda p: (p / "adapter_model.safetensors").write_bytes(b"x" * 100),
        r"truncated or no",
    ),
    "weights are a pipe": (
        lambda p: replaced(p / "adapter_model.safetensors", os.mkfifo),
        r"no regular file",
    ),
    "configuration is a pipe": (lambda p: replaced(p / "adapter_config.json", os.mkfifo), r"no regular file"),
    "weights are a device": (
        lambda p: replaced(p / "adapter_model.safetensors", lambda at: at.symlink_to("/dev/zero")),
        r"no regular file",
    ),
    "weights are a link to itself": (
        lambda p: replaced(p / "adapter_model.safetensors", lambda at: at.symlink_to(at.name)),
        r"cannot be read",
    ),
    "weights are a socket": (
        lambda p: replaced(p / "adapter_model.safetensors", bind_socket),
        r"cannot be read",
    ),
    "a huge header": (
        lambda p: (p / "adapter_model.safetensors").write_bytes(b"\xff" * 8 + b"{}"),
        r"a header of \d+ bytes",
    ),
    "a nested header": (lambda p: write_header(p, b'{"a":' * 5000 + b"1" + b"}" * 5000), r"no safetensors"),
    "a layer of many digits": (
        lambda p: safetensors.torch.save_file(
            {f"model.layers.{'9' * 5000}.mlp.up_proj.lora_A.weight": torch.ones(4, 32)},
            p / "adapter_model.safetensors",
        ),
        r"is no LoRA of a Llama",
    ),
    "weights are a folder": (
        lambda p: ((p / "adapter_model.safetensors").unlink(), (p / "adapter_model.safetensors").mkdir()),
        r"cannot be read",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_that_are_not_served(case: str, tmp_path: Path) -> None:
    change, reason = FOLDERS[case]
    folder = write_folder(tmp_path / "adapter", q_tensors())
    change(folder)
    assert_refused(folder, reason)


def test_weights_that_no_memory_has_room_for_are_not_read(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, q_tensors())
    os.truncate(folder / "adapter_model.safetensors", 1 << 40)
    with pytest.raises(AdapterRefused, match=r"has 1099511627776 bytes, at most 17825792 are read"):
        pack("a", folder, BASE, torch.bfloat16, most_bytes=1 << 19)


@pytest.mark.parametrize("kept", [4, 8, 50, 400, 2000])
def test_truncated_weights(kept: int, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, q_tensors())
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    assert_refused(folder, r"adapter_model\.safetensors is truncated")


@pytest.mark.parametrize("name", ["{path}.lora_A.weight", "{path}.lora_A.default.weight"])
@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
def test_the_spellings_of_tensor_names_mean_the_same(name: str, prefix: str, tmp_path: Path) -> None:
    plain = pack_it(write_folder(tmp_path / "plain", q_tensors()))
    renamed = {
        name.replace("{path}.lora_A", old.removesuffix(".weight")).replace(
            "base_model.model.", prefix
        ): tensor
        for old, tensor in q_tensors().items()
    }
    assert pack_it(write_folder(tmp_path / "renamed", renamed)).ref == plain.ref


def test_unset_fields_are_no_reason(tmp_path: Path) -> None:
    """A configuration with every field of today's PEFT at its default, as save_pretrained writes it."""
    fields = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]).to_dict()
    fields |= {"target_modules": ["q_proj"], "peft_type": "LORA", "field_of_the_future": None}
    folder = write_folder(tmp_path, q_tensors())
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    assert pack_it(folder)


def test_every_field_of_peft_is_honoured_irrelevant_or_refused() -> None:
    fields = set(peft.LoraConfig.__dataclass_fields__)
    assert fields <= HONOURED | IRRELEVANT | REFUSED.keys()
    assert not HONOURED & IRRELEVANT
    assert not (HONOURED | IRRELEVANT) & REFUSED.keys()
