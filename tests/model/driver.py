"""Runs a model by hand: what the scheduler and the executor do, in a few lines, over one sequence or
several."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lora.ops.base import LoraOp, LoraStep
from lora.segments import NO_SEGMENTS, SegmentTable
from lora.target_modules import SiteGroup
from model.attention.torch_paged import TorchPagedAttention
from model.batch import ForwardBatch
from model.checkpoint import load_weights
from model.checkpoint_files import read_config
from model.kv_cache import KVCache, KVLayout
from model.llama import Llama
from model.ops.eager import EagerOps

CPU = torch.device("cpu")


class NoLora:
    """The LoRA op of a model without adapters; being asked is a fault."""

    def plan(self, table: SegmentTable) -> LoraStep:
        raise AssertionError("asked for adapters in a batch without segments")


@dataclass(frozen=True)
class Piece:
    """Tokens of one sequence that run in one step, from position `start`."""

    token_ids: tuple[int, ...]
    start: int
    blocks: tuple[int, ...]


def lay_out(pieces: Sequence[Piece], block_size: int, segments: SegmentTable = NO_SEGMENTS) -> ForwardBatch:
    """The pieces as one batch, with the logits of every row."""
    positions = [p.start + i for p in pieces for i in range(len(p.token_ids))]
    slots = [
        p.blocks[(p.start + i) // block_size] * block_size + (p.start + i) % block_size
        for p in pieces
        for i in range(len(p.token_ids))
    ]
    widest = max(len(p.blocks) for p in pieces)
    return ForwardBatch(
        token_ids=torch.tensor([token for p in pieces for token in p.token_ids]),
        positions=torch.tensor(positions),
        slots=torch.tensor(slots),
        query_lens=tuple(len(p.token_ids) for p in pieces),
        context_lens=tuple(p.start + len(p.token_ids) for p in pieces),
        block_tables=torch.tensor([[*p.blocks, *[0] * (widest - len(p.blocks))] for p in pieces]),
        logit_rows=torch.arange(len(positions)),
        segments=segments,
        logit_segments=segments if segments.adapts(SiteGroup.HEAD) else NO_SEGMENTS,
    )


class Driver:
    """One model and a cache whose blocks are dealt round-robin, so that no sequence's are neighbours."""

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype = torch.float32,
        block_size: int = 4,
        lora: LoraOp | None = None,
    ) -> None:
        config = read_config(folder)
        weights = load_weights(folder, config, dtype, CPU, progress=False)
        ops = EagerOps(config, dtype, CPU, lora or NoLora())
        self.model = Llama(config, weights, TorchPagedAttention(config), ops)
        self.cache = KVCache(KVLayout.of(config, dtype, block_size), 512, CPU)

    def blocks(self, sequence: int) -> tuple[int, ...]:
        """48 blocks of the sequence (0 to 9), in no order of position."""
        return tuple(range(507 - sequence, 507 - sequence - 480, -10))

    def run(
        self, parts: Mapping[int, tuple[int, Sequence[int]]], segments: SegmentTable = NO_SEGMENTS
    ) -> dict[int, Tensor]:
        """One step of {sequence: (start, tokens)}; each sequence's logits, [rows, vocab]."""
        pieces = [Piece(tuple(tokens), start, self.blocks(s)) for s, (start, tokens) in parts.items()]
        logits = self.model.forward(lay_out(pieces, self.cache.block_size, segments), self.cache)
        split = logits.split([len(piece.token_ids) for piece in pieces])
        return dict(zip(parts, split, strict=True))

    def logits(self, token_ids: Sequence[int], chunk: int | None = None) -> Tensor:
        """[T, vocab] of one prompt, whole or in chunks."""
        size = chunk or len(token_ids)
        rows = [self.run({0: (at, token_ids[at : at + size])})[0] for at in range(0, len(token_ids), size)]
        return torch.cat(rows)

    def greedy(self, token_ids: Sequence[int], count: int, chunk: int | None = None) -> list[int]:
        """The next `count` greedy tokens."""
        token = int(self.logits(token_ids, chunk)[-1].argmax())
        tokens = [token]
        for position in range(len(token_ids), len(token_ids) + count - 1):
            token = int(self.run({0: (position, [token])})[0][-1].argmax())
            tokens.append(token)
        return tokens
