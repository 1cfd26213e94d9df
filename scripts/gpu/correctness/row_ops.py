"""Check what works row by row: the norm, products in fp8, and sampling.

The first two are held against their definition, sampling against model/sampling.py on the same logits.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lora.segments import NO_SEGMENTS
from model.batch import ForwardBatch
from model.checkpoint import torch_dtype
from model.config import ModelConfig
from model.kv_cache import KVCache, KVLayout
from model.linear.quantized import Fp8Linear
from model.sampling.sample import SampleRow, sample
from scripts.gpu.context import CheckContext
from scripts.gpu.correctness.lora import compared
from scripts.gpu.finding import Finding, check

WAYS: dict[str, SampleRow] = {
    "greedy": SampleRow(temperature=0.0),
    "temperature": SampleRow(temperature=0.8),
    "top-k": SampleRow(temperature=1.1, top_k=40),
    "top-p": SampleRow(temperature=0.9, top_p=0.9),
    "min-p": SampleRow(temperature=1.0, min_p=0.05),
    "all filters": SampleRow(temperature=1.3, top_k=200, top_p=0.95, min_p=0.01),
    "penalties": SampleRow(
        temperature=0.7,
        repetition_penalty=1.2,
        presence_penalty=0.5,
        frequency_penalty=0.3,
        prompt_token_ids=(5, 6, 7),
        output_token_ids=(7, 7, 9),
        banned_token_ids=(3,),
        logit_bias=((11, 4.0),),
    ),
}
_ROWS = 24


def findings(context: CheckContext) -> Iterator[Finding]:
    """Check each model's norm, and every way of sampling."""
    for config in context.sizes.layers:
        yield from _norms(context, config)
        if config.dtype == "bfloat16":
            yield from _products(context, config)
    for number, (name, way) in enumerate(WAYS.items()):
        drawn = [replace(way, seed=1000 * number + row, stream=row % 3, position=row) for row in range(_ROWS)]
        yield from context.try_finding(
            f"sampling, {name}", lambda name=name, drawn=drawn: _draws(context, name, drawn)
        )


def _norms(context: CheckContext, config: ModelConfig) -> Iterator[Finding]:
    width, dtype = config.hidden_size, torch_dtype(config.dtype)
    nothing = torch.zeros(1, dtype=torch.int64, device=context.device)
    batch = ForwardBatch(nothing, nothing, nothing, (1,), (1,), nothing[None], nothing, NO_SEGMENTS)
    ops = context.backends.ops(config, dtype)
    with torch.inference_mode():
        step = ops.plan(batch, KVCache(KVLayout.of(config, dtype, 16), 1, context.device))
    x, weight = context.normal(67, width, dtype=dtype), context.normal(width, dtype=dtype)

    def want() -> Tensor:
        wide = x.double()
        return wide / (wide.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weight.double()

    name = f"norm, {width} wide, {str(dtype).removeprefix('torch.')}"
    yield from compared(context, name, ops, lambda: step.norm(x, weight), want)


def _products(context: CheckContext, config: ModelConfig) -> Iterator[Finding]:
    """Check a matrix in fp8 against the numbers that it holds, the input rounded as it rounds it."""
    dtype = torch_dtype(config.dtype)
    weight = context.normal(config.intermediate_size, config.hidden_size, dtype=dtype)
    linear = Fp8Linear(weight * context.normal(len(weight), 1, dtype=dtype), None)
    held = linear.weight.double() * linear.scale.double().t()
    for rows in (1, 67):
        x = context.normal(rows, config.hidden_size, dtype=dtype)

        def product(x: Tensor = x) -> Tensor:
            return linear(x)

        def want(x: Tensor = x) -> Tensor:
            step = x.abs().amax(dim=1, keepdim=True).float() / 448
            return (x.float() / step).to(torch.float8_e4m3fn).double() * step.double() @ held.t()

        name = f"fp8 product of {rows} rows, {config.hidden_size} wide"
        yield from compared(context, name, None, product, want)


@torch.inference_mode()
def _draws(context: CheckContext, name: str, rows: Sequence[SampleRow]) -> Finding:
    """Count tokens that differ from the CPU's, of two draws from the same logits."""
    logits = context.normal(len(rows), context.sizes.vocab) * 3
    want = torch.tensor([drawn.token_id for drawn in sample(logits.cpu(), rows)])
    sampler = context.backends.sampler(64)
    found: list[Tensor] = []
    for _ in range(2):
        sampler.refill(rows)
        given = logits.clone()
        sampler.adjust(given, rows)
        found.append(sampler.draw(given).cpu().clone())
    differ = sum(int((each != want).sum()) for each in found)
    return check(f"sampling, {name}", differ, 0, "tokens", f"of {2 * len(rows)}")
