"""Load checkpoints: a Hugging Face folder and its ModelConfig in, Weights out.

A layer's matrices are fused and laid out as they are read, so that loading needs little more memory than the model.
What lies in the files is `model.tensor_files`' to read.
"""

from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm

from model.config import DtypeChoice, DtypeName, ModelConfig
from model.linear.choice import make_linear
from model.parallel import Shard
from model.tensor_files import TensorFiles, open_files
from model.weights import LayerWeights, Weights, WeightsForm

_PLAIN = WeightsForm()


def serving_dtype(config: ModelConfig, requested: DtypeChoice, device: torch.device) -> torch.dtype:
    """Return the dtype to compute in: `requested`, or the checkpoint's where that is auto.

    By auto a CPU takes float32 for float16, which few CPUs compute fast and float32 holds exactly.
    """
    if requested != "auto":
        return torch_dtype(requested)
    return torch.float32 if config.dtype == "float16" and device.type == "cpu" else torch_dtype(config.dtype)


def torch_dtype(name: DtypeName) -> torch.dtype:
    """Return torch's dtype of that name."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


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
        tensors = TensorFiles(open_files(folder, stack), dtype, device, form.shard.cut(config), form)
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
            head=make_linear(_head(tensors, config, form.shard, embedding), linear=form.linear),
        )


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
