"""Load checkpoints: a Hugging Face folder or hub name in, a ModelConfig and Weights out.

A layer's matrices are fused and laid out as they are read, so that loading needs little more memory than the model.
What lies in the files is `model.tensor_files`' to read.
"""

import hashlib
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm

from model.config import ModelConfig
from model.config_file import parse_config
from model.linear import make_linear
from model.parallel import Shard
from model.tensor_files import CheckpointError, TensorFiles, find_weight_files, open_files, read_json
from model.weights import LayerWeights, Weights, WeightsForm

DtypeChoice = Literal["auto", "float32", "bfloat16", "float16"]

_SPANS, _SPAN_BYTES = 64, 4096
_PLAIN = WeightsForm()
_HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")


def find_checkpoint(model: str) -> Path:
    """The folder of `model`: itself if it is a folder, else a snapshot of the hub model of that name.

    Raises CheckpointError when it is neither, when the hub cannot be reached, or without the `hub` extra.
    """
    folder = Path(model)
    if os.path.isdir(folder):  # noqa: PTH112 - Path.is_dir raises for names that are too long
        return folder
    if folder.is_absolute() or model.startswith(".") or model.count("/") > 1:
        raise CheckpointError(f"model={model!r} is not a folder: give one with a checkpoint, or a hub name")
    return _download(model)


def _download(model: str) -> Path:
    try:
        from huggingface_hub import snapshot_download  # noqa: PLC0415 - an optional dependency  # pyright: ignore[reportUnknownVariableType]
    except ImportError as error:
        remedy = "give a folder, or run scripts/setup hub, which installs what reads the hub"
        raise CheckpointError(
            f"model={model!r} is not a folder, and hub names need huggingface_hub: {remedy}"
        ) from error
    try:
        return Path(snapshot_download(model, allow_patterns=list(_HUB_FILES)))
    except (OSError, ValueError) as error:  # every error of the hub's client is one of these
        told = " ".join(str(error).split())
        raise CheckpointError(
            f"model={model!r} is not a folder and was not fetched from the hub: {told}"
        ) from error


def read_config(folder: Path) -> ModelConfig:
    """The model in `folder`, from its config.json and, for the end tokens, generation_config.json if it is
    there.

    Raises CheckpointError without a config.json, UnsupportedModel for what the forward pass cannot honour.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: give a folder with a Hugging Face checkpoint")
    generation = folder / "generation_config.json"
    return parse_config(read_json(path), read_json(generation) if generation.is_file() else {})


def serving_dtype(config: ModelConfig, requested: DtypeChoice, device: torch.device) -> torch.dtype:
    """Return the dtype to compute in: `requested`, or the checkpoint's where that is auto.

    By auto a CPU takes float32 for float16, which few CPUs compute fast and float32 holds exactly.
    """
    if requested != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[requested]
    return torch.float32 if config.dtype == torch.float16 and device.type == "cpu" else config.dtype


def load_weights(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    progress: bool = True,
    form: WeightsForm = _PLAIN,
) -> Weights:
    """Read the tensors that `config` (the whole model's) asks for, or `form.shard`'s part, as `dtype` on `device`.

    Raises CheckpointError naming every missing, extra, misshaped or mistyped tensor, before any is read.
    """
    with ExitStack() as stack:
        tensors = TensorFiles(
            open_files(folder, stack), dtype, device, form.shard.cut(config), form.quantization
        )
        tensors.check(expected_tensors(config, own_head="lm_head.weight" in tensors.files))
        layers = tqdm(range(config.num_layers), desc="Loading weights", unit="layer", disable=not progress)
        embedding = tensors.take("model.embed_tokens.weight")
        return Weights(
            embedding=embedding,
            layers=tuple(
                _layer(tensors, f"model.layers.{layer}", config, form.shard.config(config))
                for layer in layers
            ),
            norm=tensors.take("model.norm.weight"),
            head=make_linear(_head(tensors, config, form.shard, embedding)),
        )


def weights_digest(folder: Path) -> str:
    """Tells models with different weights apart without reading them whole: sha256 (hex) over each file's size and
    spans of 4 KiB spread evenly over it, the first of which lists its tensors."""
    found = hashlib.sha256()
    for path in find_weight_files(folder):
        size = path.stat().st_size
        found.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            for number in range(_SPANS):
                file.seek(size * number // _SPANS)
                found.update(file.read(_SPAN_BYTES))
    return found.hexdigest()


def expected_tensors(config: ModelConfig, own_head: bool = False) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model's checkpoint and its shape, by its name in Hugging Face's layout.

    With `own_head` a head is among them even where config.json ties it to the embedding.
    """
    table = (config.vocab_size, config.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": table, "model.norm.weight": table[1:]}
    if own_head or not config.tied_embeddings:
        shapes["lm_head.weight"] = table
    layer = _layer_tensors(config)
    for number in range(config.num_layers):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    return shapes


def _layer_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    shape = config.base_shape()
    sites = [(f"self_attn.{site}", site, config.qkv_bias) for site in ("q_proj", "k_proj", "v_proj")]
    sites += [("self_attn.o_proj", "o_proj", config.out_bias)]
    sites += [(f"mlp.{site}", site, config.mlp_bias) for site in ("gate_proj", "up_proj", "down_proj")]
    tensors: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (config.hidden_size,),
        "post_attention_layernorm.weight": (config.hidden_size,),
    }
    for name, site, biased in sites:
        tensors[f"{name}.weight"] = (shape.of(site).out_features, shape.of(site).in_features)
        if biased:
            tensors[f"{name}.bias"] = (shape.of(site).out_features,)
    if config.qk_norm:
        tensors |= {f"self_attn.{name}.weight": (config.head_dim,) for name in ("q_norm", "k_norm")}
    return tensors


def _head(tensors: TensorFiles, config: ModelConfig, shard: Shard, embedding: Tensor) -> Tensor:
    """The part's rows of the head, zero beyond the vocabulary: [vocab / size, hidden].

    A head in the file counts, as in transformers, though config.json may call it tied.
    """
    span = shard.vocabulary(config)
    known = range(span.start, min(span.stop, config.vocab_size))
    own = "lm_head.weight" in tensors.files
    rows = tensors.take_part("lm_head.weight", known) if own else embedding[known.start : known.stop]
    beyond = len(span) - len(known)
    return pad(rows, (0, 0, 0, beyond)) if beyond else rows


def _layer(tensors: TensorFiles, prefix: str, config: ModelConfig, part: ModelConfig) -> LayerWeights:
    """A layer of the model `config`, cut to what `part` says."""
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    return LayerWeights(
        input_norm=tensors.take(f"{prefix}.input_layernorm.weight"),
        qkv=tensors.linear(attention, ("q_proj", "k_proj", "v_proj"), config.qkv_bias),
        qk_norm=_qk_norm(tensors, attention, part) if config.qk_norm else None,
        out=tensors.linear(attention, ("o_proj",), config.out_bias),
        post_norm=tensors.take(f"{prefix}.post_attention_layernorm.weight"),
        gate_up=tensors.linear(mlp, ("gate_proj", "up_proj"), config.mlp_bias),
        down=tensors.linear(mlp, ("down_proj",), config.mlp_bias),
    )


def _qk_norm(tensors: TensorFiles, attention: str, config: ModelConfig) -> Tensor:
    q, k = tensors.take(f"{attention}.q_norm.weight"), tensors.take(f"{attention}.k_norm.weight")
    return torch.cat((q.expand(config.num_heads, -1), k.expand(config.num_kv_heads, -1)))
