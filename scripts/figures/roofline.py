"""Derive nodes by roofline: cost models from the shape of a model and the data sheet of a device.

Suites use them to ask how things change with either. Nothing here was measured; every profile says so.

    base      weights / bandwidth, + launches, + two all-reduces a layer where the model is split
    prefill   2 FLOP a weight, + the all-reduces' bytes
    LoRA      a rank row is (in + out) weights of each of seven sites a layer, split as the model is
"""

from dataclasses import dataclass

from scheduler.cluster.cost.model import CostModel, Kernel
from scheduler.cluster.cost.profile import Lengths, Limits, Profile, Slo

_LAUNCHES_S = 0.0003
_SEQUENCE_S = 5e-6  # of sampling and bookkeeping
_REDUCE_S = 8e-6  # latency of one all-reduce over NVLink
_BF16 = 2
FIXED_RANK = 128  # what kernels of one rank for all are made for


@dataclass(frozen=True, slots=True)
class RooflineModel:
    """A Llama: `kv` is the width of K, `weights` are those read in a step (no input embedding)."""

    name: str
    layers: int
    hidden: int
    kv: int
    ffn: int
    weights: float

    @property
    def rank_row(self) -> int:
        """Weights of one rank row on all seven sites."""
        q_o, k_v, mlp = 2 * 2 * self.hidden, 2 * (self.hidden + self.kv), 3 * (self.hidden + self.ffn)
        return self.layers * (q_o + k_v + mlp)


@dataclass(frozen=True, slots=True)
class RooflineDevice:
    """A GPU: what its memory and its matrix units reach, its memory, and the bytes/s between two of them."""

    name: str
    bytes_per_s: float
    flop_per_s: float
    memory_bytes: float
    link_bytes_per_s: float


LLAMA_1B = RooflineModel("Llama-3.2-1B", 16, 2048, 512, 8192, 1.24e9)
LLAMA_8B = RooflineModel("Llama-3.1-8B", 32, 4096, 1024, 14336, 7.505e9)
LLAMA_70B = RooflineModel("Llama-3.1-70B", 80, 8192, 1024, 28672, 69.5e9)
H100 = RooflineDevice("H100-80GB", 3.0e12, 6.0e14, 80e9, 450e9)
L40S = RooflineDevice("L40S-48GB", 0.75e12, 1.8e14, 48e9, 25e9)


def derived(
    shape: RooflineModel, device: RooflineDevice, slo: Slo, split: int = 1, adapter_bytes: float = 8e9
) -> Profile:
    """Derive the profile of a node of `split` devices; `adapter_bytes` of each are for adapters, 8 % spare."""
    reduced = 2 * shape.layers * shape.hidden * _BF16 * 2 * (split - 1) / split / device.link_bytes_per_s
    reduce_s = 2 * shape.layers * _REDUCE_S if split > 1 else 0.0
    read_s = _BF16 / (device.bytes_per_s * split)
    flop_s = 1 / (device.flop_per_s * split)
    kv_bytes = 2 * shape.layers * shape.kv * _BF16
    free_bytes = split * (0.92 * device.memory_bytes - adapter_bytes) - _BF16 * shape.weights
    models = tuple(
        CostModel(
            kernel=kernel,
            base_s=shape.weights * read_s + _LAUNCHES_S + reduce_s,
            prefill_token_s=2 * shape.weights * flop_s + reduced,
            decode_sequence_s=_SEQUENCE_S,
            context_token_s=kv_bytes / _BF16 * read_s,
            rank_row_s=shape.rank_row * read_s,
            token_rank_s=2 * shape.rank_row * flop_s,
            fixed_rank=FIXED_RANK if kernel is Kernel.FIXED else 0,
        )
        for kernel in Kernel
    )
    return Profile(
        hardware=f"{split} x {device.name}" if split > 1 else device.name,
        base_model=f"{shape.name}, bf16, adapters on 7 sites",
        provenance="derived",
        note="From data sheets by roofline, not measured.",
        models=models,
        slo=slo,
        lengths=Lengths(1024, 256),
        limits=Limits(2048, int(free_bytes / kv_bytes), kv_token_bytes=int(kv_bytes)),
    )
