"""A whole model over the Triton kernels says what it says over plain torch, prompts and decodes, adapters and base."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lora.ops.grouped import GroupedLora
from lora.ops.triton.op import TritonLora
from lora.segments import AdapterWeights, Segment, SegmentTable
from model.attention.torch_paged import TorchPagedAttention
from model.checkpoint import load_weights
from model.checkpoint_files import read_config
from model.kv_cache import KVCache, KVLayout
from model.llama import Llama
from model.ops.base import LayerOps
from model.ops.eager import EagerOps
from model.ops.triton.layer import TritonOps
from tests.conformance.test_lora_op import adapter
from tests.kernels.interpreter import INTERPRETED
from tests.model.driver import CPU, Piece, lay_out
from tests.oracles import hf

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")

BLOCK_SIZE = 4
F32 = torch.float32
PROMPTS = [(5, 9, 200, 31, 8, 77), (12, 13), (300, 4, 4, 90)]  # under the base, the first adapter, the second


class Model:
    """One model over one LayerOps, with a cache of its own."""

    def __init__(self, folder: Path, triton: bool) -> None:
        self.config = read_config(folder)
        weights = load_weights(folder, self.config, F32, CPU, progress=False)
        self.model = Llama(self.config, weights, TorchPagedAttention(self.config), self._ops(triton))
        self.cache = KVCache(KVLayout.of(self.config, F32, BLOCK_SIZE), 32, CPU)
        self.done = [0] * len(PROMPTS)

    def _ops(self, triton: bool) -> LayerOps:
        if triton:
            return TritonOps(self.config, F32, TritonLora(self.config.base_shape(), F32, CPU))
        return EagerOps(self.config, F32, CPU, GroupedLora())

    def run(self, tokens: Sequence[Sequence[int]], adapters: Sequence[AdapterWeights]) -> Tensor:
        """The logits of every row of a step in which each sequence continues with `tokens`."""
        pieces, segments, row = [], [], 0
        for number, following in enumerate(tokens):
            blocks = tuple(range(number, 30, len(PROMPTS)))
            pieces.append(Piece(tuple(following), self.done[number], blocks))
            if number:
                segments.append(Segment(row, row + len(following), adapters[number - 1]))
            row += len(following)
            self.done[number] += len(following)
        return self.model.forward(lay_out(pieces, BLOCK_SIZE, SegmentTable(tuple(segments))), self.cache)


@pytest.mark.parametrize("family", ["llama-3.1", "qwen3"])
def test_logits_of_prompts_and_decodes(family: str, tmp_path: Path) -> None:
    folder = hf.save(hf.build(family), tmp_path)
    eager, triton = Model(folder, triton=False), Model(folder, triton=True)
    shape = eager.config.base_shape()
    adapters = [adapter(shape, rank, seed, F32) for seed, rank in enumerate((8, 21))]
    tokens: list[Sequence[int]] = list(PROMPTS)
    for _ in range(2):
        want, found = eager.run(tokens, adapters), triton.run(tokens, adapters)
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
        last = torch.tensor([len(following) for following in tokens]).cumsum(0) - 1
        assert torch.equal(found[last].argmax(-1), want[last].argmax(-1))
        tokens = [[int(token)] for token in want[last].argmax(-1)]
