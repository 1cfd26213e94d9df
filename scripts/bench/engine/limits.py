"""The limit: how fast this machine could run a workload at best, from two measured rates.

Any engine must read each weight at least once a step and multiply each by every token. So a step takes no
less than max(bytes read / read bandwidth, FLOPs / GEMM rate): the roofline (Williams et al., "Roofline", CACM
2009). Bytes are those of the linears, of each adapter in the batch once, and of the K/V read. FLOPs are those
of the linears and of each token's adapter. Activations, attention's arithmetic and sampling are left out, so
the true limit is a little lower.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from scripts.bench.engine.workload import OfflineWorkload
from scripts.bench.llama import BenchAdapter, LlamaShape

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BEYOND_CACHE_BYTES = 1 << 28
GEMM_TOKENS = (128, 512)


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
    """The best that a workload could see: tokens/s over the whole run, TTFT with all prompts at once, and TBT."""

    output_tok_s: float
    ttft_ms: float
    tbt_ms: float


def bound(
    shape: LlamaShape, rates: Rates, workload: OfflineWorkload, adapters: Sequence[BenchAdapter], dtype: str
) -> Limit:
    """Compute the limit of one workload whose requests are alike in length.

    Prompts may be computed in any order and together: the k-th of n cannot be ready before k/n of their total
    time.
    """
    rank_of = {adapter.name: adapter.rank for adapter in adapters}
    ranks = [rank_of[request.adapter] if request.adapter else 0 for request in workload.requests]
    distinct = {request.adapter: rank for request, rank in zip(workload.requests, ranks, strict=True)}
    prompt_tokens, output_tokens = len(workload.requests[0].prompt_token_ids), workload.requests[0].max_tokens
    itemsize = DTYPES[dtype].itemsize
    read_bytes = itemsize * (
        shape.body_weights + shape.head_weights + shape.lora_weights_of_rank_one * sum(distinct.values())
    )
    kv_bytes_per_token = 2 * shape.layers * shape.kv_size * itemsize
    kv_bytes = workload.batch * (prompt_tokens + output_tokens / 2) * kv_bytes_per_token
    head_flops = 2 * workload.batch * shape.head_weights
    body_flops = 2 * sum(shape.body_weights + shape.lora_weights_of_rank_one * rank for rank in ranks)
    prefill_s = rates.seconds(read_bytes, body_flops * prompt_tokens + head_flops, dtype)
    decode_s = rates.seconds(read_bytes + kv_bytes, body_flops + head_flops, dtype)
    total_s = prefill_s + (output_tokens - 1) * decode_s
    return Limit(
        output_tok_s=workload.batch * output_tokens / total_s,
        ttft_ms=1e3 * prefill_s * (workload.batch + 1) / (2 * workload.batch),
        tbt_ms=1e3 * decode_s,
    )


def seconds_of(call: Callable[[], object], least_s: float = 0.5, least_calls: int = 5) -> float:
    """Time a call several times and return the shortest: a limit is what can be had, not what is usual."""
    times_s: list[float] = []
    while len(times_s) < least_calls or sum(times_s) < least_s:
        start_s = time.perf_counter()
        call()
        times_s.append(time.perf_counter() - start_s)
    return min(times_s)


def measure_read() -> float:
    """Measure the bytes/s at which buffers beyond the cache are read, by a sum or by a matrix-vector product."""
    numbers = torch.ones(BEYOND_CACHE_BYTES)  # float32: four times as many bytes
    matrix, vector = numbers.to(torch.bfloat16).view(-1, 2048), torch.ones(2048, dtype=torch.bfloat16)
    return max(
        numbers.nbytes / seconds_of(numbers.sum),
        matrix.nbytes / seconds_of(lambda: torch.mv(matrix, vector)),
    )


def linear_calls(weight: torch.Tensor, rows: torch.Tensor) -> Iterator[Callable[[], torch.Tensor]]:
    """Yield torch's ways to multiply rows [tokens, inputs] by a constant weight [outputs, inputs]."""
    yield lambda: F.linear(rows, weight)
    if torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(rows))
        yield lambda: torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "")


def measure_linear(outputs: int, inputs: int, tokens: int, dtype: torch.dtype) -> float:
    """Measure the seconds of one linear by the fastest way."""
    weight, rows = torch.randn(outputs, inputs).to(dtype), torch.randn(tokens, inputs).to(dtype)
    return min(seconds_of(call, least_s=0.2) for call in linear_calls(weight, rows))


def measure_gemm(shape: LlamaShape, dtype: torch.dtype) -> float:
    """Measure FLOPs/s over one layer's linears, at the number of tokens where it is highest."""
    flops = 2 * sum(outputs * inputs for outputs, inputs in shape.fused_linears.values())
    return max(
        tokens
        * flops
        / sum(measure_linear(*linear, tokens, dtype) for linear in shape.fused_linears.values())
        for tokens in GEMM_TOKENS
    )


def measure(shape: LlamaShape, dtypes: Sequence[str]) -> Rates:
    """Measure both rates with as many threads as torch has; some seconds each."""
    with torch.inference_mode():
        return Rates(measure_read(), {dtype: measure_gemm(shape, DTYPES[dtype]) for dtype in dtypes})
