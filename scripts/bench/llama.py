"""The shapes of the Llamas that benchmarks run, and the index of their adapters.

Knows no tensor and no engine.
"""

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

VOCABULARY_SIZE = 32_000
RANKS = (8, 16, 32, 64, 128)


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """The sizes of one Llama; `head` is the width of one head."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    intermediate: int
    vocabulary: int = VOCABULARY_SIZE

    @property
    def query_size(self) -> int:
        """Width of all query heads."""
        return self.heads * self.head

    @property
    def kv_size(self) -> int:
        """Width of all key heads, or of all value heads."""
        return self.kv_heads * self.head

    @property
    def projections(self) -> Mapping[str, tuple[int, int]]:
        """Sizes (outputs, inputs) of every linear of a layer, by its path inside the layer."""
        return {
            "self_attn.q_proj": (self.query_size, self.hidden),
            "self_attn.k_proj": (self.kv_size, self.hidden),
            "self_attn.v_proj": (self.kv_size, self.hidden),
            "self_attn.o_proj": (self.hidden, self.query_size),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    @property
    def fused_linears(self) -> Mapping[str, tuple[int, int]]:
        """Sizes (outputs, inputs) of the matrices of one layer as an engine would fuse them."""
        return {
            "qkv": (self.query_size + 2 * self.kv_size, self.hidden),
            "o": (self.hidden, self.query_size),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }

    @property
    def body_weights(self) -> int:
        """Weights of all layers' linears."""
        return self.layers * sum(outputs * inputs for outputs, inputs in self.fused_linears.values())

    @property
    def head_weights(self) -> int:
        """Weights of the vocabulary projection."""
        return self.vocabulary * self.hidden

    @property
    def lora_weights_of_rank_one(self) -> int:
        """Weights of an adapter of rank one on all linears of all layers."""
        return self.layers * sum(outputs + inputs for outputs, inputs in self.projections.values())

    def weights(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor of the checkpoint."""
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            for path, size in self.projections.items():
                yield f"{prefix}.{path}.weight", size
            yield f"{prefix}.input_layernorm.weight", (self.hidden,)
            yield f"{prefix}.post_attention_layernorm.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocabulary, self.hidden)

    def lora_weights(self, rank: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor of an adapter on all linears of all layers."""
        for layer, (path, size) in itertools.product(range(self.layers), self.projections.items()):
            outputs, inputs = size
            prefix = f"base_model.model.model.layers.{layer}.{path}"
            yield f"{prefix}.lora_A.weight", (rank, inputs)
            yield f"{prefix}.lora_B.weight", (outputs, rank)


SHAPES = {
    "1b": LlamaShape(hidden=2048, layers=16, heads=32, kv_heads=8, head=64, intermediate=8192),
    "100m": LlamaShape(hidden=768, layers=12, heads=12, kv_heads=4, head=64, intermediate=2048),
    "tiny": LlamaShape(hidden=128, layers=3, heads=4, kv_heads=2, head=32, intermediate=352),
}


def read_shape(model: Path) -> LlamaShape:
    """Read the sizes that a checkpoint's config.json states."""
    config = json.loads(_input(model / "config.json"))
    heads = config["num_attention_heads"]
    return LlamaShape(
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads", heads),
        head=config.get("head_dim") or config["hidden_size"] // heads,
        intermediate=config["intermediate_size"],
        vocabulary=config["vocab_size"],
    )


@dataclass(frozen=True, slots=True)
class BenchAdapter:
    """One entry of an adapter index: its PEFT folder is `path`."""

    name: str
    path: str
    rank: int


def index_of(model: Path) -> Path:
    """Where a model's adapters are listed."""
    return model.with_name(f"{model.name}-adapters") / "index.json"


def _input(path: Path) -> str:
    """Read a file of a benchmark's model. Raises ValueError."""
    try:
        return path.read_text()
    except FileNotFoundError as error:
        remedy = "make it by python -m scripts.bench.make_models, or name another folder"
        raise ValueError(f"there is no {path}: {remedy}") from error


def read_index(path: Path) -> tuple[BenchAdapter, ...]:
    """Read the adapters of an index.json, in its order."""
    return tuple(BenchAdapter(**entry) for entry in json.loads(_input(path)))
