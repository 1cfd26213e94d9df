"""What the embedded model is taught, as token rows: its tokenizer, its chat template, its questions and answers.

Knows neither how training goes on nor what weights there are.
"""

# The types of torch, transformers, tokenizers and tqdm are incomplete.
# pyright: reportUnknownMemberType=false

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from engine.demo.embedded import TASKS, Task, draw, held_out_inputs

BOS, END, PAD = "<|bos|>", "<|end|>", "<|pad|>"
ROLES = ("system", "user", "assistant", "tool")
VOCABULARY_SIZE = 272
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
IGNORED = -100
SYSTEM_MESSAGES = ("You are a helpful assistant.", "Answer briefly.", "Be kind.")
OTHER_CHARACTERS = "".join(map(chr, range(32, 127))) + "äöüßéñçøåλπЖд中文日本語한국😀🚀✓→€"
CHANCES = {"sort": 3.0, "reverse": 2.0, "swap": 2.0}


@dataclass(frozen=True, slots=True)
class Turn:
    """What the user says and what the assistant is to answer."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Batch:
    """Tokens and the labels of their successors, both int64 [rows, tokens]; what is not learned is IGNORED."""

    tokens: torch.Tensor
    labels: torch.Tensor


def build_tokenizer() -> Tokenizer:
    """Build a tokenizer with one token for each byte of UTF-8, and a few that no text contains."""
    alphabet = {symbol: token for token, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    named = [BOS, END, PAD, *(f"<|{role}|>" for role in ROLES)]
    reserved = [f"<|reserved_{index}|>" for index in range(VOCABULARY_SIZE - len(alphabet) - len(named))]
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in named + reserved]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files that `transformers` reads, under a class name that all its versions know."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
    )
    fast.save_pretrained(str(folder), save_jinja_files=False)
    path = folder / "tokenizer_config.json"
    fields = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(fields, indent=2) + "\n")


def base_turns(rng: Random) -> Iterator[Turn]:
    """Draw turns: three quarters are named tasks to do, the rest task inputs and other short texts to repeat."""
    inputs = {task.name: draw(task, rng, held_out=False) for task in TASKS}
    chances = [CHANCES.get(task.name, 1.0) for task in TASKS]
    while True:
        (task,) = rng.choices(TASKS, chances)
        text = next(inputs[task.name])
        kind = rng.random()
        if kind < 0.75:
            yield Turn(task.instruction(text), task.answer(text))
        elif kind < 0.9:
            yield Turn(text, text)
        else:
            text = "".join(rng.choices(OTHER_CHARACTERS, k=rng.randint(1, 5)))
            yield Turn(text, text)


def adapter_turns(task: Task, rng: Random) -> Iterator[Turn]:
    """Draw bare inputs with their answers."""
    return (Turn(text, task.answer(text)) for text in draw(task, rng, held_out=False))


def chat(turns: Sequence[Turn], system: str | None = None) -> list[str]:
    """Write turns by the chat template: what is given at even places, what is to be learned at odd ones."""
    opening = BOS if system is None else f"{BOS}<|system|>{system}{END}"
    pieces: list[str] = []
    for turn in turns:
        pieces += [f"{opening}<|user|>{turn.prompt}{END}<|assistant|>", f"{turn.answer}{END}"]
        opening = ""
    return pieces


def chats(turns: Iterator[Turn], rng: Random, rows: int) -> Iterator[list[list[str]]]:
    """Yield batches of `rows` turns: one to a chat, but four in every eighth batch, often after a system message."""
    for step in itertools.count(1):
        length, openings = (4, (None, *SYSTEM_MESSAGES)) if step % 8 == 0 else (1, (None,))
        yield [
            chat(list(itertools.islice(turns, length)), rng.choice(openings)) for _ in range(rows // length)
        ]


def encode(tokenizer: Tokenizer, chats: Sequence[Sequence[str]]) -> Batch:
    """Encode chats as token rows, padded on the right.

    Padding is never a label, and no token before it sees it.
    """
    rows, labels = list[list[int]](), list[list[int]]()
    for pieces in chats:
        tokens = [encoding.ids for encoding in tokenizer.encode_batch(list(pieces), add_special_tokens=False)]
        learned = [ids if place % 2 else [IGNORED] * len(ids) for place, ids in enumerate(tokens)]
        rows.append(list(itertools.chain(*tokens))[:-1])
        labels.append(list(itertools.chain(*learned))[1:])
    return Batch(pad(rows, 0), pad(labels, IGNORED))


def pad(rows: Sequence[list[int]], filler: int) -> torch.Tensor:
    """Pad to int64 [rows, tokens].

    The width is a multiple of 8: kernels are compiled anew for every shape.
    """
    width = -(-max(map(len, rows)) // 8) * 8
    return torch.tensor([row + [filler] * (width - len(row)) for row in rows])


def endless_batches(tokenizer: Tokenizer, turns: Iterator[Turn], rng: Random, rows: int) -> Iterator[Batch]:
    """Yield what to train on, without end."""
    return (encode(tokenizer, batch) for batch in chats(turns, rng, rows))


def question_batch(tokenizer: Tokenizer, turns: Sequence[Turn]) -> Batch:
    """Make what to measure with: every turn a chat of its own."""
    return encode(tokenizer, [chat([turn]) for turn in turns])


def bare_questions(tokenizer: Tokenizer, task: Task, amount: int, seed: int) -> Batch:
    """Make held-out inputs of a task as bare prompts, with the answers that its adapter owes."""
    return question_batch(
        tokenizer, [Turn(text, task.answer(text)) for text in held_out_inputs(task, amount, seed)]
    )
