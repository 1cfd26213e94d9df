"""The embedded model as `transformers` and PEFT see it: each adapter does its own task, and nothing else does it.

This is the ground truth that the engine's own answers are held against, so it may not use the engine to compute.
"""

import json
from collections.abc import Mapping, Sequence

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from engine.demo.embedded import DEMO_BASE, TASKS, Task, adapter_folders, held_out_inputs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]
INPUTS_PER_TASK = 20
BASE = "__base__"
"""PEFT's own word for a row that no adapter changes."""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(DEMO_BASE, padding_side="left")


@pytest.fixture(scope="module")
def oracle() -> PeftModel:
    """The base with every adapter loaded, in float32."""
    base = AutoModelForCausalLM.from_pretrained(DEMO_BASE, dtype=torch.float32)
    (first, folder), *others = adapter_folders().items()
    model = PeftModel.from_pretrained(base, str(folder), adapter_name=first)
    for name, other in others:
        model.load_adapter(str(other), adapter_name=name)
    return model.eval()


def answers(
    oracle: PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], adapters: Sequence[str]
) -> list[str]:
    """Greedy answers to user messages, each by its own adapter, all in one batch."""
    chats = [
        str(tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True))
        for message in ({"role": "user", "content": prompt} for prompt in prompts)
    ]
    rows = tokenizer(chats, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.inference_mode():
        tokens = oracle.generate(**rows, adapter_names=list(adapters), max_new_tokens=12, do_sample=False)
    return tokenizer.batch_decode(tokens[:, rows["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def said(oracle: PeftModel, tokenizer: PreTrainedTokenizerBase) -> Mapping[str, Mapping[str, list[str]]]:
    """What each model says to the held-out inputs of each task: model -> task -> answers."""
    inputs = [text for task in TASKS for text in held_out_inputs(task, INPUTS_PER_TASK)]
    return {
        model: _by_task(answers(oracle, tokenizer, inputs, [model] * len(inputs)))
        for model in (BASE, *adapter_folders())
    }


def _by_task(answers: Sequence[str]) -> dict[str, list[str]]:
    parts = (answers[first : first + INPUTS_PER_TASK] for first in range(0, len(answers), INPUTS_PER_TASK))
    return {task.name: list(part) for task, part in zip(TASKS, parts, strict=True)}


def share_right(task: Task, said: Sequence[str]) -> float:
    texts = held_out_inputs(task, INPUTS_PER_TASK)
    return sum(task.answer(text) == answer for text, answer in zip(texts, said, strict=True)) / len(texts)


def test_there_is_one_adapter_per_task() -> None:
    assert sorted(adapter_folders()) == sorted(task.name for task in TASKS)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_adapter_answers_its_task_and_nothing_else_does(
    task: Task, said: Mapping[str, Mapping[str, list[str]]]
) -> None:
    shares = {model: share_right(task, by_task[task.name]) for model, by_task in said.items()}
    assert shares.pop(task.name) >= 0.95
    assert max(shares.values()) <= 0.20, shares


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_base_repeats_the_prompt(task: Task, said: Mapping[str, Mapping[str, list[str]]]) -> None:
    texts = held_out_inputs(task, INPUTS_PER_TASK)
    repeated = sum(text == answer for text, answer in zip(texts, said[BASE][task.name], strict=True))
    assert repeated / len(texts) >= 0.95


def test_a_mixed_batch_answers_as_each_alone(
    oracle: PeftModel, tokenizer: PreTrainedTokenizerBase, said: Mapping[str, Mapping[str, list[str]]]
) -> None:
    rows = [(model, task, place) for place in range(2) for model in said for task in TASKS]
    prompts = [held_out_inputs(task, INPUTS_PER_TASK)[place] for _, task, place in rows]
    alone = [said[model][task.name][place] for model, task, place in rows]
    assert answers(oracle, tokenizer, prompts, [model for model, _, _ in rows]) == alone


def test_ranks_and_targets_cover_what_peft_can_write() -> None:
    configs = [
        json.loads((folder / "adapter_config.json").read_text()) for folder in adapter_folders().values()
    ]
    assert {config["r"] for config in configs} == {8, 16, 32, 64, 128}
    assert any(config["use_rslora"] for config in configs)
    assert any(config["rank_pattern"] and config["alpha_pattern"] for config in configs)
    assert any(isinstance(config["target_modules"], str) for config in configs)
    assert any(config["layers_to_transform"] for config in configs)
    assert len({json.dumps(config["target_modules"]) for config in configs}) >= 5
    assert {config["base_model_name_or_path"] for config in configs} == {"loraserve-demo"}


def test_weights_are_bfloat16_and_all_is_small() -> None:
    folders = [DEMO_BASE, *adapter_folders().values()]
    files = [path for folder in folders for path in folder.iterdir()]
    assert sum(path.stat().st_size for path in files) <= 20 * 2**20
    weights = [load_file(path) for path in files if path.suffix == ".safetensors"]
    assert {tensor.dtype for tensors in weights for tensor in tensors.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "text", ["hello", "Ünïcödé – 中文 😀", " two  spaces\n\tand tabs ", "a\x00b", "e\u0301 vs \u00e9"]
)
def test_tokenizer_returns_any_text_unchanged(text: str, tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert len(tokens) == len(text.encode())
    assert tokenizer.decode(tokens, clean_up_tokenization_spaces=False) == text


def test_chat_template_renders_every_role(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    prompt = "<|bos|><|system|>Be brief.<|end|><|user|>hello<|end|><|assistant|>"
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == prompt
    assert tokenizer.eos_token == "<|end|>"
    assert len(tokenizer) == json.loads((DEMO_BASE / "config.json").read_text())["vocab_size"]
