"""What holds of the forward pass whatever the family: independence of the batch, adapters by row, rows asked for."""

from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor

from lora.format.packed import view
from lora.format.peft import pack
from lora.ops.reference import ReferenceLora
from lora.segments import AdapterWeights, Segment, SegmentTable
from lora.target_modules import SITES
from tests.model.driver import Driver, Piece, lay_out
from tests.oracles import hf

PROMPTS = [
    torch.randint(3, 320, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (1, 2, 7, 16, 33, 40, 64, 5, 21)
]
STEPS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf.save(hf.build("llama-3.1"), tmp_path_factory.mktemp("llama"))


def alone(driver: Driver, sequence: int) -> list[Tensor]:
    """The logits of each step's last row, decoding greedily by itself."""
    prompt = PROMPTS[sequence]
    rows = [driver.run({sequence: (0, prompt)})[sequence][-1]]
    for position in range(len(prompt), len(prompt) + STEPS - 1):
        rows.append(driver.run({sequence: (position, [int(rows[-1].argmax())])})[sequence][-1])
    return rows


def together(driver: Driver) -> list[list[Tensor]]:
    """The same for all prompts at once; a new one joins in every step, so prompts run beside decodes."""
    rows: list[list[Tensor]] = [[] for _ in PROMPTS]
    for step in range(STEPS + len(PROMPTS) - 1):
        parts = {}
        for sequence, prompt in enumerate(PROMPTS):
            done = rows[sequence]
            if sequence <= step and len(done) < STEPS:
                following = (len(prompt) + len(done) - 1, [int(done[-1].argmax())]) if done else (0, prompt)
                parts[sequence] = following
        for sequence, logits in driver.run(parts).items():
            rows[sequence].append(logits[-1])
    return rows


def test_a_sequence_is_computed_alike_alone_and_among_others(folder: Path) -> None:
    """Bit for bit in float32, for prompts and decodes that come and go."""
    expected = [alone(Driver(folder), sequence) for sequence in range(len(PROMPTS))]
    for found, by_itself in zip(together(Driver(folder)), expected, strict=True):
        assert len(found) == STEPS
        assert all(torch.equal(a, b) for a, b in zip(found, by_itself, strict=True))


def test_only_the_rows_asked_for_have_logits(folder: Path) -> None:
    driver = Driver(folder)
    pieces = [Piece(tuple(PROMPTS[4]), 0, driver.blocks(0)), Piece(tuple(PROMPTS[2]), 0, driver.blocks(1))]
    batch = lay_out(pieces, driver.cache.block_size)
    every = driver.model.forward(batch, driver.cache)
    assert every.dtype == torch.float32
    some = driver.model.forward(replace(batch, logit_rows=torch.tensor([39, 5])), driver.cache)
    assert torch.equal(some, every[[39, 5]])
    none = driver.model.forward(replace(batch, logit_rows=torch.tensor([], dtype=torch.int64)), driver.cache)
    assert none.shape == (0, 320)


ADAPTERS = {
    "small": peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"]),
    "large": peft.LoraConfig(r=16, lora_alpha=16, use_rslora=True, target_modules=list(SITES)),
}


def adapted(name: str) -> peft.PeftModel:
    """The oracle under a random adapter whose B is not zero."""
    model = peft.get_peft_model(hf.build("llama-3.1"), ADAPTERS[name])
    assert isinstance(model, peft.PeftModel)
    generator = torch.Generator().manual_seed(len(name))
    for key, parameter in sorted(model.named_parameters()):
        if "lora_" in key:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model.eval()


@pytest.fixture(scope="module")
def oracles() -> dict[str, peft.PeftModel]:
    return {name: adapted(name) for name in ADAPTERS}


@pytest.fixture(scope="module")
def adapters(
    oracles: dict[str, peft.PeftModel], folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, AdapterWeights]:
    shape = Driver(folder).model.config.base_shape()
    packed = {}
    for name, oracle in oracles.items():
        saved = tmp_path_factory.mktemp(name)
        oracle.save_pretrained(str(saved))
        content = pack(name, saved, shape, torch.float32)
        packed[name] = view(content.rows, content.layout, content.ref.digest)
    return packed


def test_rows_of_different_adapters_equal_peft(
    folder: Path, oracles: dict[str, peft.PeftModel], adapters: dict[str, AdapterWeights]
) -> None:
    """Base, small and large adapter in one batch of prompts, then of decodes."""
    driver = Driver(folder, lora=ReferenceLora())
    theirs: dict[str, torch.nn.Module] = {"base": hf.build("llama-3.1"), **oracles}
    names, prompts = ("base", "small", "large"), (PROMPTS[2], PROMPTS[4], PROMPTS[3])
    sequences = [list(prompt) for prompt in prompts]
    starts = [0, 0, 0]
    for _ in range(6):
        new = [sequence[start:] for sequence, start in zip(sequences, starts, strict=True)]
        edges = torch.tensor([0, *map(len, new)]).cumsum(0).tolist()
        table = SegmentTable(
            tuple(
                Segment(edges[i], edges[i + 1], adapters[name])
                for i, name in enumerate(names)
                if name != "base"
            )
        )
        parts = {i: (starts[i], new[i]) for i in range(3)}
        for i, logits in driver.run(parts, table).items():
            expected = hf.logits(theirs[names[i]], sequences[i])[-1]
            torch.testing.assert_close(logits[-1], expected, atol=1e-4, rtol=1e-4)
            starts[i] = len(sequences[i])
            sequences[i].append(int(logits[-1].argmax()))
