"""What works row by row: the norm and products in fp8 against their definition, and drawing against model/sampling.py
on the same logits."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lora.segments import NO_SEGMENTS
from model.batch import ForwardBatch
from model.config import ModelConfig
from model.kv_cache import KVCache, KVLayout
from model.linear import Fp8Linear
from model.sampling.sample import SampleRow, sample
from scripts.gpu.kernels_lora import compared
from scripts.gpu.row import Row, check
from scripts.gpu.stand import Stand

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


def rows(stand: Stand) -> Iterator[Row]:
    """Each model's norm, and every way of drawing."""
    for config in stand.sizes.layers:
        yield from _norms(stand, config)
        if config.dtype == torch.bfloat16:
            yield from _products(stand, config)
    for number, (name, way) in enumerate(WAYS.items()):
        drawn = [replace(way, seed=1000 * number + row, stream=row % 3, position=row) for row in range(_ROWS)]
        yield from stand.try_row(
            f"sampling, {name}", lambda name=name, drawn=drawn: _draws(stand, name, drawn)
        )


def _norms(stand: Stand, config: ModelConfig) -> Iterator[Row]:
    width, dtype = config.hidden_size, config.dtype
    nothing = torch.zeros(1, dtype=torch.int64, device=stand.device)
    batch = ForwardBatch(nothing, nothing, nothing, (1,), (1,), nothing[None], nothing, NO_SEGMENTS)
    ops = stand.backends.ops(config, dtype)
    with torch.inference_mode():
        step = ops.plan(batch, KVCache(KVLayout.of(config, dtype, 16), 1, stand.device))
    x, weight = stand.normal(67, width, dtype=dtype), stand.normal(width, dtype=dtype)

    def want() -> Tensor:
        wide = x.double()
        return wide / (wide.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weight.double()

    name = f"norm, {width} wide, {str(dtype).removeprefix('torch.')}"
    yield from compared(stand, name, ops, lambda: step.norm(x, weight), want)


def _products(stand: Stand, config: ModelConfig) -> Iterator[Row]:
    """A matrix in fp8 against the numbers that it holds, and the input's rounded as it rounds them."""
    weight = stand.normal(config.intermediate_size, config.hidden_size, dtype=config.dtype)
    linear = Fp8Linear(weight * stand.normal(len(weight), 1, dtype=config.dtype), None)
    held = linear.weight.double() * linear.scale.double().t()
    for rows in (1, 67):
        x = stand.normal(rows, config.hidden_size, dtype=config.dtype)

        def product(x: Tensor = x) -> Tensor:
            return linear(x)

        def want(x: Tensor = x) -> Tensor:
            step = x.abs().amax(dim=1, keepdim=True).float() / 448
            return (x.float() / step).to(torch.float8_e4m3fn).double() * step.double() @ held.t()

        name = f"fp8 product of {rows} rows, {config.hidden_size} wide"
        yield from compared(stand, name, None, product, want)


@torch.inference_mode()
def _draws(stand: Stand, name: str, rows: Sequence[SampleRow]) -> Row:
    """Tokens that differ from the CPU's, of two draws from the same logits."""
    logits = stand.normal(len(rows), stand.sizes.vocab) * 3
    want = torch.tensor([drawn.token_id for drawn in sample(logits.cpu(), rows)])
    sampler = stand.backends.sampler(64)
    found = []
    for _ in range(2):
        sampler.refill(rows)
        given = logits.clone()
        sampler.adjust(given, rows)
        found.append(sampler.draw(given).cpu().clone())
    differ = sum(int((each != want).sum()) for each in found)
    return check(f"sampling, {name}", differ, 0, "tokens", f"of {2 * len(rows)}")
