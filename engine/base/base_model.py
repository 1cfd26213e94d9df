"""Choose the base model that an engine computes with, how much of it is on this device, and in which form.

Nothing is read but its config.json. It may not know who computes the other parts, nor what memory there is.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from engine.base.backends import Backends, choose_backends
from engine.base.model_card import base_folder
from engine.config.config import Device, EngineConfig
from engine.errors import InvalidConfig
from lora.format.sharding import ShardSpec
from lora.target_modules import LAYER_GROUPS, BaseShape
from model.attention.choice import make_attention
from model.checkpoint import load_weights, serving_dtype
from model.checkpoint_files import read_config
from model.config import LinearChoice, LinearName, ModelConfig, Quantization
from model.kv_cache import KVLayout
from model.linear.choice import choose_linear
from model.llama import Llama
from model.ops.choice import make_ops
from model.parallel import Collective, Shard, shard_sizes
from model.weights import Weights, WeightsForm

_FP8_STEP = 16  # elements: what the fp8 product's rows and columns are counted in


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A checkpoint's folder and what it says (`config`), computed in `dtype` on `device` by `backends`.

    `form` says which part of it is this device's, and how its matrices are kept.
    """

    folder: Path
    config: ModelConfig
    dtype: torch.dtype
    device: torch.device
    form: WeightsForm
    backends: Backends

    @property
    def part(self) -> ModelConfig:
        """Return what this device computes, as a model of its own."""
        return self.form.shard.config(self.config)

    def shard_specs(self) -> tuple[ShardSpec, ...]:
        """Return every device's part of each projection, this one's among them."""
        size = self.form.shard.size
        return tuple(Shard(rank, size).cut(self.config) for rank in range(size))

    def kv_layout(self, block_size: int) -> KVLayout:
        """Return how this device's K/V blocks lie in memory."""
        return KVLayout.of(self.part, self.dtype, block_size)

    def load(self, progress: bool) -> Weights:
        """Read this device's part. Raises CheckpointError."""
        return load_weights(self.folder, self.config, self.dtype, self.device, progress, self.form)

    def build(self, weights: Weights, collective: Collective | None) -> Llama:
        """Make the forward pass over `weights`; its sums go over the devices of `collective`, if there is one."""
        backends = self.backends
        attention = make_attention(backends.attention, self.part, self.device)
        base = self.form.shard.cut(self.config).shape
        how = self.dtype, backends.lora_dtype, self.device, backends.uses_triton, self.form.linear
        ops = make_ops(self.part, base, *how)
        return Llama(self.part, weights, attention, ops, collective)


def choose_base(config: EngineConfig) -> BaseModel:
    """Choose the base model that `config` names, its first part if it is for several devices.

    Raises CheckpointError, UnsupportedModel or InvalidConfig.
    """
    device = _device(config.device)
    folder = base_folder(config)
    model = read_config(folder)
    dtype = serving_dtype(model, config.dtype, device)
    size = config.tensor_parallel_size
    _check_size(config, model, device)
    part = Shard(0, size).config(model).base_shape()
    quantization = _quantization(config.quantization, dtype, device, part)
    form = WeightsForm(Shard(0, size), quantization, _linear(config.linear_backend, dtype, device))
    backends = choose_backends(config, model, dtype, device)
    return BaseModel(folder, model, dtype, device if size == 1 else device_of(device, 0), form, backends)


def device_of(device: torch.device, rank: int) -> torch.device:
    """Return the device of part `rank`, of the kind of `device`."""
    return torch.device("cuda", rank) if device.type == "cuda" else device


def _device(choice: Device) -> torch.device:
    if choice == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if choice == "cuda" and not torch.cuda.is_available():
        raise InvalidConfig("device", choice, "torch sees no CUDA device here: use cpu or auto")
    return torch.device(choice)


def _check_size(config: EngineConfig, model: ModelConfig, device: torch.device) -> None:
    size, sizes = config.tensor_parallel_size, shard_sizes(model)
    if size not in sizes:
        shape = f"{model.num_heads} heads, {model.num_kv_heads} key-value heads, {model.intermediate_size} columns"
        remedy = f"the model ({shape}) can be cut into {', '.join(map(str, sizes))} parts: give one of these"
        raise InvalidConfig("tensor_parallel_size", size, remedy)
    if device.type == "cuda" and size > torch.cuda.device_count():
        seen = torch.cuda.device_count()
        raise InvalidConfig(
            "tensor_parallel_size", size, f"torch sees {seen} CUDA devices: give at most that many"
        )
    if size > 1 and config.peers.enabled:
        raise InvalidConfig(
            "tensor_parallel_size", size, "adapters in parts cannot be shared with peers: give 1, or no peers"
        )


def _linear(choice: LinearChoice, dtype: torch.dtype, device: torch.device) -> LinearName:
    try:
        return choose_linear(choice, dtype, device)
    except ValueError as error:
        raise InvalidConfig("linear_backend", choice, str(error)) from error


def _quantization(
    choice: Quantization, dtype: torch.dtype, device: torch.device, part: BaseShape
) -> Quantization:
    """Return the choice, if this device can multiply so. Raises InvalidConfig."""
    if choice == "int8" and device.type != "cpu":
        raise InvalidConfig("quantization", choice, "int8 is for the CPU: use fp8 or none")
    if choice == "fp8":
        _check_fp8(dtype, device, part)
    return choice


def _check_fp8(dtype: torch.dtype, device: torch.device, part: BaseShape) -> None:
    sizes = {(part.of(group.sites[0]).in_features, part.group_out(group)) for group in LAYER_GROUPS}
    odd = sorted({size for pair in sizes for size in pair if size % _FP8_STEP})
    remedy = ""
    if device.type != "cuda":
        remedy = "a CPU has no fp8 arithmetic: use int8 or none"
    elif torch.cuda.get_device_capability(device) < (8, 9):
        remedy = "this GPU has no fp8 arithmetic (before sm_89): use none"
    elif dtype != torch.bfloat16:
        remedy = "fp8 products are given out in bfloat16: use --dtype bfloat16"
    elif odd:
        told = (
            f"a matrix of this device has a side of {odd[0]}, and fp8 products need multiples of {_FP8_STEP}"
        )
        remedy = f"{told}: use none"
    if remedy:
        raise InvalidConfig("quantization", "fp8", remedy)
