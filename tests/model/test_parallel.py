"""A model in parts is the model: each part has its share of heads, columns and adapters, and nobody's is lost."""

from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor

from lora.format.packed import view
from lora.format.peft import PackedAdapter, pack
from lora.format.sharding import shard_layout, shard_rows
from lora.ops.grouped import GroupedLora
from lora.segments import AdapterWeights, Segment, SegmentTable
from lora.target_modules import SITES
from model.attention.torch_paged import TorchPagedAttention
from model.checkpoint import load_weights
from model.checkpoint_files import read_config
from model.config import ModelConfig
from model.kv_cache import KVCache, KVLayout
from model.llama import Llama
from model.ops.eager import EagerOps
from model.parallel import WHOLE, Shard, shard_sizes
from model.weights import WeightsForm
from tests.fakes.collective import Meeting, ThreadCollective
from tests.model.driver import CPU, Piece, lay_out
from tests.oracles import hf
from tests.oracles.peft_model import PeftOracle, write_adapter

ADAPTERS = {
    "mlp": peft.LoraConfig(r=5, lora_alpha=10, target_modules=["gate_proj", "up_proj", "down_proj"]),
    "all": peft.LoraConfig(r=9, lora_alpha=4, use_rslora=True, target_modules=list(SITES)),
    "qv": peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"]),
}
PROMPTS = {None: (5, 9, 200, 31), "mlp": (77, 8, 11), "all": (4, 4, 250, 17, 93), "qv": (301, 6)}
BLOCK, BLOCKS = 4, 16


class Part:
    """One device: its part of the model, its K/V and its shares of the adapters."""

    def __init__(self, folder: Path, shard: Shard, collective: ThreadCollective | None) -> None:
        whole = read_config(folder)
        self.config, self.cut, self.collective = shard.config(whole), shard.cut(whole), collective
        weights = load_weights(folder, whole, torch.float32, CPU, False, WeightsForm(shard))
        ops = EagerOps(self.config, torch.float32, CPU, GroupedLora())
        self.model = Llama(self.config, weights, TorchPagedAttention(self.config), ops, collective)
        self.cache = KVCache(KVLayout.of(self.config, torch.float32, BLOCK), BLOCKS, CPU)

    def share(self, packed: PackedAdapter) -> AdapterWeights:
        narrow = shard_layout(packed.layout, self.cut)
        rows = torch.zeros(narrow.nbytes, dtype=torch.uint8)
        shard_rows(packed.rows, packed.layout, self.cut, rows)
        return view(rows, narrow, packed.ref.digest)

    def forward(self, adapters: dict[str, PackedAdapter]) -> Tensor:
        """The logits of all prompts, each under its adapter: a step of prompts, then one of one row each."""
        segments, row = [], 0
        pieces = []
        for number, (name, prompt) in enumerate(PROMPTS.items()):
            pieces.append(Piece(prompt, 0, (2 * number + 1, 2 * number)))
            if name is not None:
                segments.append(Segment(row, row + len(prompt), self.share(adapters[name])))
            row += len(prompt)
        prompts = self.model.forward(lay_out(pieces, BLOCK, SegmentTable(tuple(segments))), self.cache)
        decodes = [Piece((7,), len(piece.token_ids), piece.blocks) for piece in pieces]
        ones = tuple(Segment(i + 1, i + 2, segment.adapter) for i, segment in enumerate(segments))
        return torch.cat(
            (prompts, self.model.forward(lay_out(decodes, BLOCK, SegmentTable(ones)), self.cache))
        )


def in_parts(folder: Path, size: int, adapters: dict[str, PackedAdapter]) -> tuple[Tensor, list[Part]]:
    meeting = Meeting(size)
    parts = [Part(folder, Shard(rank, size), meeting.member(rank)) for rank in range(size)]
    return meeting.run([lambda part=part: part.forward(adapters) for part in parts])[0], parts


@pytest.mark.parametrize(
    ("family", "size"),
    [
        *((family, 2) for family in hf.FAMILIES),
        ("llama-3.1", 4),
        ("llama-biased", 4),
        ("qwen3", 4),
        ("llama-2", 4),
    ],
)
def test_parts_compute_what_the_whole_does(family: str, size: int, tmp_path: Path) -> None:
    base = hf.build(family)
    folder = hf.save(base, tmp_path / "base")
    folders = {name: write_adapter(base, tmp_path / name, config, 1) for name, config in ADAPTERS.items()}
    shape = read_config(folder).base_shape()
    adapters = {name: pack(name, where, shape, torch.float32) for name, where in folders.items()}
    found, parts = in_parts(folder, size, adapters)
    torch.testing.assert_close(found, Part(folder, WHOLE, None).forward(adapters), rtol=2e-5, atol=2e-5)
    oracle, first = PeftOracle(base, folders), 0
    for name, prompt in PROMPTS.items():
        rows = found[first : first + len(prompt)].log_softmax(-1)
        torch.testing.assert_close(rows, oracle.logprobs(name, prompt), rtol=1e-4, atol=1e-4)
        first += len(prompt)
    step = ["sum"] * 2 * parts[0].config.num_layers + ["gather"]
    assert all(part.collective is not None and part.collective.calls == step * 2 for part in parts)


def test_a_step_without_logits_gathers_nothing(tmp_path: Path) -> None:
    folder, meeting = hf.save(hf.build("llama-3"), tmp_path), Meeting(2)
    parts = [Part(folder, Shard(rank, 2), meeting.member(rank)) for rank in range(2)]
    batch = lay_out([Piece((5, 6), 0, (0,))], BLOCK)
    empty = torch.tensor([], dtype=torch.int64)

    def forward(part: Part) -> Tensor:
        return part.model.forward(replace(batch, logit_rows=empty), part.cache)

    found = meeting.run([lambda part=part: forward(part) for part in parts])
    assert all(len(logits) == 0 for logits in found)
    assert parts[0].collective is not None
    assert "gather" not in parts[0].collective.calls


def _config(folder: Path, family: str) -> ModelConfig:
    return read_config(hf.save(hf.build(family), folder))


def test_sizes_are_those_that_cut_whole_heads(tmp_path: Path) -> None:
    assert shard_sizes(_config(tmp_path / "a", "llama-3")) == (1, 2, 4)  # 4 heads over 2 kv heads, 96 columns
    assert shard_sizes(_config(tmp_path / "b", "llama-head-dim")) == (1, 2, 4)  # one kv head on all


@pytest.mark.parametrize("size", [2, 4])
def test_parts_cover_every_head_and_column_once(size: int, tmp_path: Path) -> None:
    config = _config(tmp_path, "llama-2")
    cuts = [Shard(rank, size).cut(config) for rank in range(size)]
    for site, shape in zip(SITES, config.base_shape().shapes, strict=True):
        inner = site in ("o_proj", "down_proj")
        spans = [cut.of(site).inputs if inner else cut.of(site).outputs for cut in cuts]
        assert [i for span in spans for i in span] == list(
            range(shape.in_features if inner else shape.out_features)
        )
    vocabulary = [token for rank in range(size) for token in Shard(rank, size).vocabulary(config)]
    assert vocabulary[: config.vocab_size] == list(range(config.vocab_size))


def test_an_odd_vocabulary_is_cut_with_a_remainder(tmp_path: Path) -> None:
    config = _config(tmp_path, "llama-3")
    assert config.vocab_size == 320
    shards = [Shard(rank, 3).vocabulary(config) for rank in range(3)]
    assert [len(span) for span in shards] == [107, 107, 107]
    assert shards[2].stop == 321
