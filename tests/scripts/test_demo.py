"""The training script: it teaches in the words of the chat template, and writes every file in its final form."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from engine.demo.embedded import TASKS, held_out_inputs
from scripts.demo.__main__ import faults, main, table
from scripts.demo.lessons import IGNORED, Turn, bare_questions, build_tokenizer, chat, save_tokenizer
from scripts.demo.training import recipes

PERFECT = {"base": {task.name: 0.0 for task in TASKS}} | {
    adapter.name: {task.name: float(task is adapter) for task in TASKS} for adapter in TASKS
}


def test_chat_is_what_the_saved_template_renders(tmp_path: Path) -> None:
    save_tokenizer(build_tokenizer(), tmp_path)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "eno"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "owt"},
    ]
    rendered = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(messages, tokenize=False)
    assert "".join(chat([Turn("one", "eno"), Turn("two", "owt")], "Be brief.")) == rendered


def test_only_answers_are_labels() -> None:
    tokenizer = build_tokenizer()
    task = TASKS[0]
    batch = bare_questions(tokenizer, task, amount=5, seed=2)
    answers = [
        tokenizer.decode(row[row != IGNORED].tolist(), skip_special_tokens=False) for row in batch.labels
    ]
    assert answers == [task.answer(text) + "<|end|>" for text in held_out_inputs(task, 5, seed=2)]
    assert batch.tokens.shape == batch.labels.shape
    assert batch.tokens.dtype == torch.int64


def test_every_task_has_a_recipe_of_its_own() -> None:
    assert sorted(recipes()) == sorted(task.name for task in TASKS)
    assert {recipe.r for recipe in recipes().values()} == {8, 16, 32, 64, 128}


@pytest.mark.parametrize(
    ("model", "task", "share", "broken"),
    [
        ("reverse", "reverse", 0.95, []),
        ("reverse", "reverse", 0.94, ["reverse answers 94.0% of reverse"]),
        ("base", "sort", 0.20, []),
        ("base", "sort", 0.21, ["base answers 21.0% of sort"]),
        ("upper", "sort", 0.50, ["upper answers 50.0% of sort"]),
    ],
)
def test_bounds(model: str, task: str, share: float, broken: list[str]) -> None:
    shares: Mapping[str, Mapping[str, float]] = PERFECT | {model: PERFECT[model] | {task: share}}
    assert faults(shares) == broken


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_quick_run_writes_base_and_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "--workers", "1", "--out", str(tmp_path)]) == 0
    assert {path.name for path in (tmp_path / "base").iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for task in TASKS:
        files = {path.name for path in (tmp_path / "adapters" / task.name).iterdir()}
        assert files == {"adapter_config.json", "adapter_model.safetensors"}
    printed = capsys.readouterr().out
    assert "torch.bfloat16" in printed
    assert len(table(PERFECT).splitlines()) == len(TASKS) + 2
