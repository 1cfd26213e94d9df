"""Parallel: one model on several devices, by parts that are models themselves, with fewer heads and a narrower MLP.

Each device computes its heads' and inner columns' share of a layer, and a partial sum of what goes back into the
residual stream: one sum over the devices after attention and one after the MLP (Megatron-LM, arXiv 1909.08053).
The head is cut by vocabulary, since a step reads all of it; the embedding is whole on each device, since a step
reads few of its rows and cutting it would cost a third sum. How devices talk is not known here.
"""

from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from lora.format.sharding import ShardSpec, SiteShard
from model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Shard:
    """Part `rank` (from 0) of `size` parts of a model. `size` is one of `shard_sizes`."""

    rank: int = 0
    size: int = 1

    def config(self, config: ModelConfig) -> ModelConfig:
        """The part as a model of its own; a kv head is on as many devices as share its query heads."""
        return replace(
            config,
            num_heads=config.num_heads // self.size,
            num_kv_heads=max(1, config.num_kv_heads // self.size),
            intermediate_size=config.intermediate_size // self.size,
        )

    def cut(self, config: ModelConfig) -> ShardSpec:
        """Which part of each projection of the whole model `config` is this one's."""
        part = self.config(config)
        first_kv_head = self.rank * config.num_kv_heads // self.size
        hidden = (0, config.hidden_size)
        q = _span(self.rank * part.q_size, part.q_size)
        kv = _span(first_kv_head * config.head_dim, part.kv_size)
        inner = _span(self.rank * part.intermediate_size, part.intermediate_size)
        ends = ((hidden, q), (hidden, kv), (hidden, kv), (q, hidden))
        ends += ((hidden, inner), (hidden, inner), (inner, hidden))
        tokens = self.vocabulary(config)
        head = SiteShard(*hidden, tokens.start, tokens.stop)
        embedding = SiteShard(0, config.vocab_size, *hidden)
        sites = tuple(SiteShard(*inputs, *outputs) for inputs, outputs in ends)
        return ShardSpec(config.num_layers, sites, (head, embedding))

    def vocabulary(self, config: ModelConfig) -> range:
        """The token ids whose logits are this part's; all parts' ranges have equal lengths, so the last may go
        beyond the vocabulary."""
        count = -(-config.vocab_size // self.size)
        return range(self.rank * count, (self.rank + 1) * count)


WHOLE = Shard()


def shard_sizes(config: ModelConfig) -> tuple[int, ...]:
    """Into how many parts the model can be cut: by whole heads, with equal parts."""
    heads, kv_heads = config.num_heads, config.num_kv_heads
    return tuple(
        size
        for size in range(1, heads + 1)
        if heads % size == config.intermediate_size % size == 0
        and (kv_heads % size == 0 or size % kv_heads == 0)
    )


class Collective(Protocol):
    """What the devices of one model do together; all of them make the same calls in the same order."""

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all devices' `x` (contiguous, of one shape), on each of them and the same bit for bit; may
        overwrite `x`."""
        ...

    def gather(self, x: Tensor) -> Tensor:
        """On the first device all devices' `x` ([T, n], of one shape), one beside the other: [T, size * n]; `x` on
        the others."""
        ...


def _span(start: int, length: int) -> tuple[int, int]:
    return start, start + length
