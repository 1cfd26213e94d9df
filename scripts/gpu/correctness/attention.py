"""Check every attention kernel against softmax(q Kᵀ / sqrt(d)) V in float64.

Steps are prompts, decode, both, and reserved ones.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lora.segments import NO_SEGMENTS
from model.attention.base import AttentionStep, GraphAttention
from model.batch import ForwardBatch
from model.config import ModelConfig
from model.kv_cache import KVCache, KVLayout
from scripts.gpu.context import CheckContext
from scripts.gpu.correctness.lora import BLOCK_SIZE, compared
from scripts.gpu.finding import Finding, failed, skipped
from scripts.gpu.sizes import llama

SequenceRows = tuple[int, int]
"""A sequence's rows in the step: positions `start` to `stop`."""

STEPS: dict[str, list[SequenceRows]] = {
    "decode": [(0, 1), (16, 17), (300, 301), (1023, 1024), (63, 64), (1999, 2000)],
    "prompts": [(0, 1), (0, 17), (0, 300), (0, 129)],
    "mixed": [(40, 41), (0, 77), (100, 180), (1500, 1501), (600, 620), (15, 16)],
}
GEOMETRIES: dict[str, tuple[ModelConfig, torch.dtype]] = {
    "8 of 32 heads of 128, bf16": (llama(64, 64, 1, (32, 8, 128), 8, "bfloat16"), torch.bfloat16),
    "2 of 14 heads of 64, bf16": (llama(64, 64, 1, (14, 2, 64), 8, "bfloat16"), torch.bfloat16),
    "window of 70, bf16": (
        replace(llama(64, 64, 1, (8, 4, 64), 8, "bfloat16"), windows=(70,)),
        torch.bfloat16,
    ),
    "2 of 4 heads of 32, float32": (llama(64, 64, 1, (4, 2, 32), 8, "float32"), torch.float32),
}


def findings(context: CheckContext) -> Iterator[Finding]:
    """Check each backend, each geometry, each kind of step."""
    for geometry, (config, dtype) in GEOMETRIES.items():
        for name, maker in context.backends.attentions(config, dtype).items():
            label = f"{name}, {geometry}"
            if isinstance(maker, str):
                yield skipped(label, maker)
                continue
            try:
                backend = maker()
            except Exception as error:  # noqa: BLE001 - a library that cannot work here is a finding
                yield failed(label, error)
                continue
            for kind, parts in STEPS.items():
                case = AttentionCase(context, config, dtype, parts)
                yield from context.guarded(
                    f"{kind}, {label}", _step(context, f"{kind}, {label}", case, backend)
                )


class AttentionCase:
    """A step's sequences with known K and V in shuffled blocks, and NaN in every other place."""

    def __init__(
        self, context: CheckContext, config: ModelConfig, dtype: torch.dtype, parts: Sequence[SequenceRows]
    ) -> None:
        self.config, self.parts = config, parts
        counts = [-(-stop // BLOCK_SIZE) for _, stop in parts]
        order = torch.randperm(sum(counts), device=context.device, generator=context.generator)
        dealt = torch.split(order, counts)
        self.cache = KVCache(KVLayout.of(config, dtype, BLOCK_SIZE), sum(counts), context.device)
        keys, values = self.cache.layer(0)
        for kept in (keys, values):
            kept[: self.cache.num_blocks] = torch.nan
        heads = (config.num_kv_heads, config.head_dim)
        self.kv = [
            (context.normal(stop, *heads, dtype=dtype), context.normal(stop, *heads, dtype=dtype))
            for _, stop in parts
        ]
        self.tables = torch.zeros(len(parts), max(counts), dtype=torch.int64, device=context.device)
        for number, (blocks, (k, v)) in enumerate(zip(dealt, self.kv, strict=True)):
            self.tables[number, : len(blocks)] = blocks
            slots = self._slots(number, 0, len(k))
            keys.flatten(0, 1)[slots], values.flatten(0, 1)[slots] = k, v
        rows = sum(stop - start for start, stop in parts)
        self.q = context.normal(rows, config.num_heads, config.head_dim, dtype=dtype)

    def _slots(self, number: int, start: int, stop: int) -> Tensor:
        at = torch.arange(start, stop, device=self.tables.device)
        return self.tables[number][at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE

    def batch(self) -> ForwardBatch:
        """Make the step's batch."""
        device = self.tables.device
        positions = torch.cat([torch.arange(*part, device=device) for part in self.parts])
        slots = torch.cat([self._slots(number, *part) for number, part in enumerate(self.parts)])
        return ForwardBatch(
            token_ids=torch.zeros_like(positions),
            positions=positions,
            slots=slots,
            query_lens=tuple(stop - start for start, stop in self.parts),
            context_lens=tuple(stop for _, stop in self.parts),
            block_tables=self.tables,
            logit_rows=positions[:0],
            segments=NO_SEGMENTS,
        )

    def rows_of(self, which: int) -> Tensor:
        """Select the step's own rows of K (0) or V (1)."""
        return torch.cat(
            [kv[which][start:stop] for kv, (start, stop) in zip(self.kv, self.parts, strict=True)]
        )

    def attend(self, step: AttentionStep) -> Tensor:
        """Attend over the step's rows: [T, columns]."""
        return step.attend(0, self.q, self.rows_of(0), self.rows_of(1))

    def expected(self) -> Tensor:
        """Compute the result by the definition."""
        config, outs, row = self.config, list[Tensor](), 0
        group, window = config.num_heads // config.num_kv_heads, config.windows[0]
        for (start, stop), kv in zip(self.parts, self.kv, strict=True):
            q = self.q[row : row + stop - start].double()
            k, v = (x.double().repeat_interleave(group, dim=1) for x in kv)
            scores = torch.einsum("thd,shd->hts", q, k) / config.head_dim**0.5
            at, position = (torch.arange(*span, device=q.device) for span in ((start, stop), (0, stop)))
            hidden = position > at[:, None]
            if window is not None:
                hidden |= position <= at[:, None] - window
            outs.append(torch.einsum("hts,shd->thd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v))
            row += stop - start
        return torch.cat(outs).flatten(1)


def _step(
    context: CheckContext, name: str, case: AttentionCase, backend: GraphAttention
) -> Iterator[Finding]:
    batch = case.batch()

    def planned() -> Tensor:
        return case.attend(backend.plan(batch, case.cache))

    yield from compared(context, name, backend, planned, case.expected)
    if max(batch.query_lens) > 1:
        return

    def reserved() -> Tensor:
        rows, blocks = batch.block_tables.shape
        step = backend.reserve(rows, blocks, case.cache)
        step.refill(batch)
        return case.attend(step)

    yield from compared(context, f"reserved {name}", backend, reserved, case.expected)
