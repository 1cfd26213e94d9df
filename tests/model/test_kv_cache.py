"""The cache's bytes and what a write leaves in it."""

import torch

from model.config_file import parse_config
from model.kv_cache import KVCache, KVLayout
from tests.model.test_config_file import LLAMA


def test_block_bytes_are_what_the_tensors_take() -> None:
    layout = KVLayout.of(parse_config(LLAMA, {}), torch.bfloat16, 16)
    cache = KVCache(layout, 5, torch.device("cpu"))
    tensors = [tensor for layer in range(layout.num_layers) for tensor in cache.layer(layer)]
    # besides its own, a block that is never written and one that is never read
    assert sum(tensor.nbytes for tensor in tensors) == (5 + 2) * layout.block_bytes
    assert layout.block_bytes == 4 * 2 * 16 * 2 * 8 * 2  # layers, K and V, tokens, heads, head_dim, bytes


def test_a_write_fills_its_slots_and_no_other() -> None:
    layout = KVLayout(num_layers=2, num_kv_heads=2, head_dim=4, block_size=3, dtype=torch.float32)
    cache = KVCache(layout, 4, torch.device("cpu"))
    slots = torch.tensor([7, 0, 11])
    k, v = torch.rand(3, 2, 4) + 1, torch.rand(3, 2, 4) + 1
    cache.write(1, slots, k, v)
    for cached, rows in zip(cache.layer(1), (k, v), strict=True):
        flat = cached.flatten(0, 1)
        assert torch.equal(flat[slots], rows)
        assert flat.count_nonzero() == rows.numel()
    assert not any(tensor.any() for tensor in cache.layer(0))
