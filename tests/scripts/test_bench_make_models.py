"""The benchmarks' models are what other readers of the same formats take them for."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts.bench import make_models
from scripts.bench.llama import SHAPES, VOCABULARY_SIZE
from scripts.bench.make_models import draw


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the smallest model and three adapters."""
    out = tmp_path_factory.mktemp("models")
    make_models.main(["--sizes", "tiny", "--out", str(out), "--adapters", "3"])
    return out


def test_the_checkpoint_has_every_weight_of_its_architecture(models: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(models / "tiny")
    expected = dict(SHAPES["tiny"].weights())
    assert {name: tuple(weight.shape) for name, weight in model.named_parameters()} == expected
    assert model.dtype == torch.bfloat16


def test_adapters_change_what_the_base_says_each_in_its_way(models: Path) -> None:
    index = json.loads((models / "tiny-adapters" / "index.json").read_text())
    assert [entry["rank"] for entry in index] == [8, 16, 32]
    base = AutoModelForCausalLM.from_pretrained(models / "tiny", dtype=torch.float32)
    token_ids = torch.randint(0, 31_000, (1, 16), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        said = [base(token_ids).logits]
        model = PeftModel.from_pretrained(base, index[0]["path"], adapter_name=index[0]["name"])
        for entry in index:
            model.load_adapter(entry["path"], adapter_name=entry["name"])
            model.set_adapter(entry["name"])
            said.append(model(token_ids).logits)
    changes = [float((one - said[0]).std() / said[0].std()) for one in said[1:]]
    assert all(0.01 < change < 1 for change in changes)
    assert not torch.equal(said[1], said[2])
    shapes = dict(SHAPES["tiny"].lora_weights(8))
    assert len(shapes) == 2 * 7 * SHAPES["tiny"].layers


def test_the_tokenizer_gives_text_back_and_has_a_text_for_every_id(models: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models / "tiny")
    for text in ("Hello, world!", "naïve 東京 🚀", "a\n\tb"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert len(tokenizer) == VOCABULARY_SIZE
    assert all(tokenizer.decode([token_id]) for token_id in range(256, 32_000, 997))


def test_weights_depend_on_name_and_seed_alone() -> None:
    assert torch.equal(draw("a", (4, 4), 0), draw("a", (4, 4), 0))
    assert not torch.equal(draw("a", (4, 4), 0), draw("a", (4, 4), 1))
    assert not torch.equal(draw("a", (4, 4), 0), draw("b", (4, 4), 0))
