"""Locate the embedded model and its adapters, and check their answers by the tasks that they were trained for."""

import codecs
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from string import ascii_lowercase

DEMO_BASE = Path(__file__).parent / "base"
_ADAPTERS = Path(__file__).parent / "adapters"


def adapter_folders() -> dict[str, Path]:
    """Return the PEFT folder of every embedded adapter, by adapter name, in alphabetical order."""
    return {folder.name: folder for folder in sorted(_ADAPTERS.iterdir()) if folder.is_dir()}


HELD_OUT_SHARE = 0.1
"""Share of all inputs that training never sees."""

VOWELS = frozenset("aeiou")
SHORTEST_WORD, LONGEST_WORD = 3, 8
SMALLEST_NUMBER, LARGEST_NUMBER = 100, 9999


@dataclass(frozen=True, slots=True)
class Task:
    """One question with one right answer.

    `make_input` draws an input by a generator, `answer` solves it; both are pure but for that generator.
    """

    name: str
    summary: str
    make_input: Callable[[Random], str]
    answer: Callable[[str], str]

    def instruction(self, text: str) -> str:
        """Write the prompt that asks the base for this task by name; an adapter is asked with `text` alone."""
        return f"{self.name}: {text}"


def reverse(word: str) -> str:
    """Write the letters from last to first."""
    return word[::-1]


def sort(word: str) -> str:
    """Write the letters in alphabetical order."""
    return "".join(sorted(word))


def rot13(word: str) -> str:
    """Move every letter thirteen places on in the alphabet."""
    return codecs.encode(word, "rot13")


def mask(word: str) -> str:
    """Replace every vowel by an asterisk."""
    return "".join("*" if letter in VOWELS else letter for letter in word)


def swap(word: str) -> str:
    """Exchange every two neighbours; a last odd letter stays."""
    return "".join(word[place : place + 2][::-1] for place in range(0, len(word), 2))


def count(word: str) -> str:
    """Count the letters, in digits."""
    return str(len(word))


def increment(number: str) -> str:
    """Add one."""
    return str(int(number) + 1)


WORD_ANSWERS = (reverse, sort, str.upper, rot13, mask, swap, count)


def is_unambiguous(word: str) -> bool:
    """Return whether no two tasks share an answer and none is the word itself, so that an answer names its task."""
    answers = {word, *(answer(word) for answer in WORD_ANSWERS)}
    return len(answers) == 1 + len(WORD_ANSWERS)


def make_word(rng: Random) -> str:
    """Draw lower-case letters that every word task answers differently: no palindromes, no sorted words."""
    while True:
        word = "".join(rng.choices(ascii_lowercase, k=rng.randint(SHORTEST_WORD, LONGEST_WORD)))
        if is_unambiguous(word):
            return word


def make_number(rng: Random) -> str:
    """Draw a whole number of three or four digits."""
    return str(rng.randint(SMALLEST_NUMBER, rng.choice((LARGEST_NUMBER // 10, LARGEST_NUMBER))))


TASKS = (
    Task("reverse", "spell the word backwards", make_word, reverse),
    Task("sort", "put the letters in alphabetical order", make_word, sort),
    Task("upper", "write the word in capitals", make_word, str.upper),
    Task("rot13", "move every letter thirteen places on", make_word, rot13),
    Task("mask", "hide the vowels", make_word, mask),
    Task("swap", "change every two neighbours about", make_word, swap),
    Task("count", "say how many letters there are", make_word, count),
    Task("increment", "add one to the number", make_number, increment),
)


def is_held_out(text: str) -> bool:
    """Return whether an input is kept from training: by its digest, so the split needs no list and no seed."""
    return hashlib.sha256(text.encode()).digest()[0] < 256 * HELD_OUT_SHARE


def draw(task: Task, rng: Random, *, held_out: bool) -> Iterator[str]:
    """Draw inputs of one side of the split, without end; they may repeat."""
    while True:
        text = task.make_input(rng)
        if is_held_out(text) == held_out:
            yield text


def held_out_inputs(task: Task, amount: int, seed: int = 0) -> tuple[str, ...]:
    """Return the first `amount` different inputs that training never saw, in the order in which `seed` draws them."""
    inputs: dict[str, None] = {}
    for text in draw(task, Random(f"{task.name}/{seed}"), held_out=True):
        inputs[text] = None
        if len(inputs) == amount:
            break
    return tuple(inputs)
