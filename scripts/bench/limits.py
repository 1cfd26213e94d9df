"""The limit: how fast this machine could run a workload at best, from two measured rates.

Any engine must read each weight at least once a step and multiply each by every token, so a step of `tokens`
tokens takes no less than  max(bytes read / read bandwidth, FLOPs / GEMM rate)  (the roofline: Williams et
al., "Roofline", CACM 2009). Bytes are those of the linears, of the adapters in the batch, each once, and of
the K/V read; FLOPs those of the linears and of each token's adapter. Activations, attention's arithmetic and
sampling are left out, so the true limit is a little lower still.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from scripts.bench.workload import Adapter, Workload

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BEYOND_CACHE_BYTES = 1 << 28
GEMM_TOKENS = (128, 512)


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What of a Llama-shaped checkpoint decides its cost."""

    hidden: int
    layers: int
    queries: int
    keys: int
    intermediate: int
    vocabulary: int

    @property
    def linears(self) -> Mapping[str, tuple[int, int]]:
        """(outputs, inputs) of the matrices of one layer as an engine would fuse them."""
        return {
            "qkv": (self.queries + 2 * self.keys, self.hidden),
            "o": (self.hidden, self.queries),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }

    @property
    def body_weights(self) -> int:
        """Weights of all layers' linears."""
        return self.layers * sum(outputs * inputs for outputs, inputs in self.linears.values())

    @property
    def head_weights(self) -> int:
        """Weights of the vocabulary projection."""
        return self.vocabulary * self.hidden

    @property
    def lora_weights_of_rank_one(self) -> int:
        """Weights of an adapter of rank one on all linears of all layers."""
        wide = self.queries + 2 * self.keys + 3 * self.hidden  # q, k, v
        out = self.hidden + self.queries
        mlp = 3 * (self.hidden + self.intermediate)
        return self.layers * (wide + out + mlp)


def read_size(model: Path) -> ModelSize:
    """The sizes that a checkpoint's config.json states."""
    config = json.loads((model / "config.json").read_text())
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or config["hidden_size"] // heads
    return ModelSize(
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        queries=heads * head,
        keys=config.get("num_key_value_heads", heads) * head,
        intermediate=config["intermediate_size"],
        vocabulary=config["vocab_size"],
    )


@dataclass(frozen=True, slots=True)
class Rates:
    """What the machine was measured to do."""

    read_bytes_per_s: float
    gemm_flops_per_s: Mapping[str, float]  # by dtype

    def seconds(self, read_bytes: float, flops: float, dtype: str) -> float:
        """The roofline's bound on one step."""
        return max(read_bytes / self.read_bytes_per_s, flops / self.gemm_flops_per_s[dtype])


@dataclass(frozen=True, slots=True)
class Limit:
    """The best that a workload could see: everything in tokens/s, the mean time to first token with all
    prompts arriving at once, and the time between tokens."""

    output_tok_s: float
    ttft_ms: float
    tbt_ms: float


def bound(
    size: ModelSize, rates: Rates, workload: Workload, adapters: Sequence[Adapter], dtype: str
) -> Limit:
    """The limit of one workload whose rows are alike in length.

    Prompts may be computed in any order and together: the k-th of n cannot be ready before k/n of their total
    time.
    """
    rank_of = {adapter.name: adapter.rank for adapter in adapters}
    ranks = [rank_of[row.adapter] if row.adapter else 0 for row in workload.rows]
    distinct = {row.adapter: rank for row, rank in zip(workload.rows, ranks, strict=True)}
    prompt_tokens, output_tokens = len(workload.rows[0].prompt_token_ids), workload.rows[0].max_tokens
    itemsize = DTYPES[dtype].itemsize
    read_bytes = itemsize * (
        size.body_weights + size.head_weights + size.lora_weights_of_rank_one * sum(distinct.values())
    )
    kv_bytes_per_token = 2 * size.layers * size.keys * itemsize
    kv_bytes = workload.batch * (prompt_tokens + output_tokens / 2) * kv_bytes_per_token
    head_flops = 2 * workload.batch * size.head_weights
    body_flops = 2 * sum(size.body_weights + size.lora_weights_of_rank_one * rank for rank in ranks)
    prefill_s = rates.seconds(read_bytes, body_flops * prompt_tokens + head_flops, dtype)
    decode_s = rates.seconds(read_bytes + kv_bytes, body_flops + head_flops, dtype)
    total_s = prefill_s + (output_tokens - 1) * decode_s
    return Limit(
        output_tok_s=workload.batch * output_tokens / total_s,
        ttft_ms=1e3 * prefill_s * (workload.batch + 1) / (2 * workload.batch),
        tbt_ms=1e3 * decode_s,
    )


def seconds_of(call: Callable[[], object], least_s: float = 0.5, least_calls: int = 5) -> float:
    """The shortest time of a call: a limit is what can be had, not what is usual."""
    times_s: list[float] = []
    while len(times_s) < least_calls or sum(times_s) < least_s:
        start_s = time.perf_counter()
        call()
        times_s.append(time.perf_counter() - start_s)
    return min(times_s)


def measure_read() -> float:
    """Bytes per second at which buffers beyond the cache can be read: the better of a sum and a
    matrix-vector product."""
    numbers = torch.ones(BEYOND_CACHE_BYTES)  # float32: four times as many bytes
    matrix, vector = numbers.to(torch.bfloat16).view(-1, 2048), torch.ones(2048, dtype=torch.bfloat16)
    return max(
        numbers.nbytes / seconds_of(numbers.sum),
        matrix.nbytes / seconds_of(lambda: torch.mv(matrix, vector)),
    )


def linear_calls(weight: torch.Tensor, rows: torch.Tensor) -> Iterator[Callable[[], torch.Tensor]]:
    """The ways torch offers to multiply rows [tokens, inputs] by a weight [outputs, inputs] that never
    changes."""
    yield lambda: F.linear(rows, weight)
    if torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(rows))
        yield lambda: torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "")


def measure_linear(outputs: int, inputs: int, tokens: int, dtype: torch.dtype) -> float:
    """Seconds of one linear by the best of the ways."""
    weight, rows = torch.randn(outputs, inputs).to(dtype), torch.randn(tokens, inputs).to(dtype)
    return min(seconds_of(call, least_s=0.2) for call in linear_calls(weight, rows))


def measure_gemm(size: ModelSize, dtype: torch.dtype) -> float:
    """FLOPs per second over one layer's linears, at the number of tokens where it is highest."""
    flops = 2 * sum(outputs * inputs for outputs, inputs in size.linears.values())
    return max(
        tokens * flops / sum(measure_linear(*shape, tokens, dtype) for shape in size.linears.values())
        for tokens in GEMM_TOKENS
    )


def measure(size: ModelSize, dtypes: Sequence[str]) -> Rates:
    """Measure both rates with as many threads as torch has; some seconds each."""
    with torch.inference_mode():
        return Rates(measure_read(), {dtype: measure_gemm(size, DTYPES[dtype]) for dtype in dtypes})
