"""The embedded model through the engine: each adapter answers its own task, and a mix answers as each alone."""

from collections import Counter
from collections.abc import Iterator, Mapping

import pytest

from engine import LLM, SamplingParams
from engine.demo.embedded import TASKS, Task, held_out_inputs

NUM_INPUTS = 20
GREEDY = SamplingParams(temperature=0, max_tokens=16)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    made = LLM(dtype="float32", kv_cache_bytes=1 << 28, adapter_bytes=1 << 26)
    yield made
    made.close()


@pytest.fixture(scope="module")
def shares(llm: LLM) -> Mapping[str | None, Mapping[str, float]]:
    """The share of each task's inputs that each model answers as the task demands: model -> task -> share."""
    asked = [(task, text) for task in TASKS for text in held_out_inputs(task, NUM_INPUTS)]
    prompts = [llm.tokenizer.encode_chat([{"role": "user", "content": text}]) for _, text in asked]
    found: dict[str | None, Counter[str]] = {}
    for model in (None, *(task.name for task in TASKS)):
        answers = [result.outputs[0].text for result in llm.generate(prompts, GREEDY, model)]
        rows = zip(asked, answers, strict=True)
        found[model] = Counter(task.name for (task, text), answer in rows if answer == task.answer(text))
    return {
        model: {task.name: right[task.name] / NUM_INPUTS for task in TASKS} for model, right in found.items()
    }


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_only_its_own_adapter_answers_a_task(
    shares: Mapping[str | None, Mapping[str, float]], task: Task
) -> None:
    of_task = {model: by_task[task.name] for model, by_task in shares.items()}
    assert of_task.pop(task.name) >= 0.95
    assert max(of_task.values()) <= 0.2, of_task


def test_a_mix_of_all_adapters_answers_exactly_as_each_does_alone(llm: LLM) -> None:
    names = [None, *(task.name for task in TASKS)]
    inputs = tuple(text for task in TASKS for text in held_out_inputs(task, 8, seed=1))
    mixed_names = [names[number % len(names)] for number in range(len(inputs))]
    prompts = [llm.tokenizer.encode_chat([{"role": "user", "content": text}]) for text in inputs]
    mixed = llm.generate(prompts, GREEDY, mixed_names)
    for prompt, name, result in zip(prompts, mixed_names, mixed, strict=True):
        alone = llm.generate([prompt], GREEDY, name)[0]
        assert result.outputs[0].token_ids == alone.outputs[0].token_ids


def test_the_same_seed_draws_the_same_tokens_whatever_else_is_in_the_batch(llm: LLM) -> None:
    prompts = [
        llm.tokenizer.encode_chat([{"role": "user", "content": text}])
        for text in ("planet", "river", "stone")
    ]
    params = SamplingParams(temperature=8.0, top_p=0.95, seed=7, n=2, max_tokens=12)
    alone = llm.generate(prompts[:1], params, "reverse")[0]
    other = SamplingParams(temperature=1.0, max_tokens=20)
    together = llm.generate([*prompts[1:], prompts[0]], [other, other, params], ["sort", None, "reverse"])[2]
    assert [output.token_ids for output in together.outputs] == [output.token_ids for output in alone.outputs]
    assert alone.outputs[0].token_ids != alone.outputs[1].token_ids
