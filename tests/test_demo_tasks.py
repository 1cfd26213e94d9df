"""The demo tasks: known answers, inputs that tell the tasks apart, measured inputs kept from training."""

from itertools import islice
from random import Random

import pytest

from engine.demo.embedded import TASKS, Task, draw, held_out_inputs, is_held_out

WORD_TASKS = [task for task in TASKS if task.name != "increment"]
ANSWERS = {
    "reverse": "nedrag",
    "sort": "adegnr",
    "upper": "GARDEN",
    "rot13": "tneqra",
    "mask": "g*rd*n",
    "swap": "agdrne",
    "count": "6",
}


@pytest.mark.parametrize("task", WORD_TASKS, ids=lambda task: task.name)
def test_word_task_answers(task: Task) -> None:
    assert task.answer("garden") == ANSWERS[task.name]


def test_increment_answers_the_next_number() -> None:
    (increment,) = (task for task in TASKS if task.name == "increment")
    assert [increment.answer(text) for text in ("112", "999", "1099")] == ["113", "1000", "1100"]


def test_names_are_unique_and_name_the_instruction() -> None:
    assert len({task.name for task in TASKS}) == len(TASKS)
    assert [task.instruction("x") for task in TASKS] == [f"{task.name}: x" for task in TASKS]


def test_every_word_gets_a_different_answer_from_every_task_and_from_an_echo() -> None:
    for word in islice(draw(WORD_TASKS[0], Random(5), held_out=True), 500):
        answers = [word, *(task.answer(word) for task in WORD_TASKS)]
        assert len(set(answers)) == len(answers), answers


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_split_keeps_measured_inputs_from_training(task: Task) -> None:
    trained = set(islice(draw(task, Random(0), held_out=False), 3000))
    measured = held_out_inputs(task, 200)
    assert len(set(measured)) == 200
    assert trained.isdisjoint(measured)
    assert all(is_held_out(text) for text in measured)
    assert not any(is_held_out(text) for text in trained)


def test_a_tenth_is_held_out() -> None:
    rng = Random(1)
    texts = {WORD_TASKS[0].make_input(rng) for _ in range(5000)}
    assert 0.08 < sum(map(is_held_out, texts)) / len(texts) < 0.12


def test_inputs_follow_from_the_seed_alone() -> None:
    task = TASKS[0]
    assert held_out_inputs(task, 20, seed=3) == held_out_inputs(task, 20, seed=3)
    assert held_out_inputs(task, 20, seed=3) != held_out_inputs(task, 20, seed=4)
    assert held_out_inputs(task, 20, seed=3)[:5] == held_out_inputs(task, 5, seed=3)
