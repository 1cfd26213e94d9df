"""KVCache: the tensors that hold every layer's keys and values, in blocks. Which block is whose is the
scheduler's."""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The size of a block: `block_size` tokens of every layer's keys and values."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype

    @classmethod
    def of(cls, config: ModelConfig, dtype: torch.dtype, block_size: int) -> "KVLayout":
        """The layout for a model that computes in `dtype`."""
        return cls(config.num_layers, config.num_kv_heads, config.head_dim, block_size, dtype)

    @property
    def block_bytes(self) -> int:
        """Memory that one block takes over all layers."""
        per_token = self.num_layers * 2 * self.num_kv_heads * self.head_dim
        return per_token * self.block_size * self.dtype.itemsize


class KVCache:
    """Per layer one tensor of keys and one of values, [blocks, block_size, num_kv_heads, head_dim].

    Tokens lie one after another, each with all its heads: a step's rows are written as they leave the
    projection, and a block is one contiguous run of bytes to gather or to send. Memory is zeroed and, on a
    CPU, only taken from the system when a block is first written.

    `memory` may be a part of a pool that others use: [at least (num_blocks + 2) * block_bytes] uint8. Then a block's
    layers lie one after another, so that it is one run of bytes; only the two blocks at its end are zeroed.
    """

    def __init__(
        self, layout: KVLayout, num_blocks: int, device: torch.device, memory: Tensor | None = None
    ) -> None:
        shape = (num_blocks + 2, layout.block_size, layout.num_kv_heads, layout.head_dim)
        layers = range(layout.num_layers)
        self.layout, self.num_blocks, self.device = layout, num_blocks, device
        self._is_shared = memory is not None
        if memory is None:
            self._keys = tuple(torch.zeros(shape, dtype=layout.dtype, device=device) for _ in layers)
            self._values = tuple(torch.zeros(shape, dtype=layout.dtype, device=device) for _ in layers)
            return
        blocks = memory[: (num_blocks + 2) * layout.block_bytes].view(layout.dtype).view(shape[0], -1)
        blocks[num_blocks:].zero_()
        parts = blocks.view(shape[0], layout.num_layers, 2, *shape[1:])
        self._keys, self._values = ([parts[:, layer, which] for layer in layers] for which in (0, 1))

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self.layout.block_size

    @property
    def zero_block(self) -> int:
        """The block that is never written."""
        return self.num_blocks

    @property
    def spare_block(self) -> int:
        """The block that takes the K/V of rows which only pad a step, and that nothing reads."""
        return self.num_blocks + 1

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """The layer's key and value tensors, [num_blocks + 2, block_size, num_kv_heads, head_dim]; within a block
        they are contiguous."""
        return self._keys[layer], self._values[layer]

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store rows k, v [T, num_kv_heads, head_dim] at slots [T] (block * block_size + offset)."""
        if self._is_shared:
            place = (slots // self.block_size, slots % self.block_size)
            self._keys[layer].index_put_(place, k)
            self._values[layer].index_put_(place, v)
        else:
            self._keys[layer].view(-1, *k.shape[1:]).index_copy_(0, slots, k)
            self._values[layer].view(-1, *v.shape[1:]).index_copy_(0, slots, v)
