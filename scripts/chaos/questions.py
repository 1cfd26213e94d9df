"""Draw what clients ask, when they ask it, and what they are owed.

A question is a word for one adapter's task. Its answer goes on after the end token, so that streams are long enough to
be caught by a fault. One engine, alone and before the cluster starts, says what the whole answer is; the task's program
says whether its first part is right.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine import LLM, SamplingParams
from engine.demo.embedded import TASKS, held_out_inputs
from scheduler.sim.workload.popularity import Popularity, ZipfLaw, chosen
from scheduler.sim.workload.trace import Call, paced, poisson, read_trace
from scripts.chaos.adapter_copies import AdapterCopy

_LEAST_TOKENS = 16  # an answer and the end token always fit
_END = "<|end|>"
_TRACE = "azure_llm_2023_conv.csv"
_MEAN_LENGTHS = (1_155, 211)  # tokens of a prompt and of an answer of that trace
_LAW = ZipfLaw(0.8)


@dataclass(frozen=True, slots=True)
class Asked:
    """A request to be: when it comes, which adapter it names, with which word, and how many tokens it asks for."""

    at_s: float
    adapter: AdapterCopy
    text: str
    tokens: int


class Answers:
    """What every word is answered with, by one engine that nothing happens to."""

    def __init__(self, words: int, tokens: int, seed: int) -> None:
        """Answer so many words of each task, in so many tokens. Raises ValueError for an answer that is wrong."""
        if tokens < _LEAST_TOKENS:
            raise ValueError(f"tokens={tokens}: an answer and its end need {_LEAST_TOKENS}; give more")
        asked = [(task, text) for task in TASKS for text in held_out_inputs(task, words, seed)]
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, skip_special_tokens=False)
        chats = [[{"role": "user", "content": text}] for _, text in asked]
        with LLM(dtype="float32", progress=False) as llm:
            results = llm.chat(chats, params, adapters=[task.name for task, _ in asked])
        self.tokens = tokens
        self._whole = {
            (task.name, text): result.outputs[0].text
            for (task, text), result in zip(asked, results, strict=True)
        }
        for task, text in asked:
            if not self._whole[task.name, text].startswith(task.answer(text) + _END):
                raise ValueError(
                    f"one engine alone answers {task.name} of {text!r} wrongly: try another seed"
                )

    def words(self, task: str) -> list[str]:
        """List the words of a task."""
        return [text for name, text in self._whole if name == task]

    def is_right(self, asked: Asked, answer: str, tokens: int) -> bool:
        """Tell whether an answer is that of the task's program, and goes on as that of one engine."""
        task = asked.adapter.task
        return (
            tokens == asked.tokens
            and answer.startswith(task.answer(asked.text) + _END)
            and self._whole[task.name, asked.text].startswith(answer)
        )


def calls(traces: Path | None, rate: float, seconds: float, rng: np.random.Generator) -> tuple[Call, ...]:
    """Return when requests come and how long they are: as in Azure's trace where there is one, else drawn."""
    if traces is None:
        return poisson(rate, seconds, _MEAN_LENGTHS, rng)
    traced = read_trace((traces / _TRACE).read_text())
    return paced(traced, rate, seconds, int(rng.integers(len(traced))))


def draw_questions(
    copies: Sequence[AdapterCopy],
    answers: Answers,
    arriving: Sequence[Call],
    rng: np.random.Generator,
    law: Popularity = _LAW,
) -> list[Asked]:
    """Give each call an adapter by `law`, a word, and half the length that it asked for, as far as that is known."""
    ranks = np.array([copy.rank for copy in copies])
    last_s = max((call.arrival_s for call in arriving), default=0.0) + 1e-9
    at = np.array([call.arrival_s / last_s for call in arriving]) * (1 - 1e-9)
    adapters: list[int] = chosen(law, ranks, at, rng).tolist()
    asked: list[Asked] = []
    for call, index in zip(arriving, adapters, strict=True):
        words = answers.words(copies[index].task.name)
        tokens = min(answers.tokens, max(_LEAST_TOKENS, call.output_tokens // 2))
        asked.append(Asked(call.arrival_s, copies[index], words[int(rng.integers(len(words)))], tokens))
    return asked
