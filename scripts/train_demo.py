"""Make the embedded model: a small Llama with a byte tokenizer and a chat template, and one LoRA adapter per demo task.

The base is taught two things: to do every task of `engine.demo.tasks` when a prompt names it (`reverse: hello` -> `olleh`), and
to repeat a prompt that names none (`hello` -> `hello`). Each adapter then learns to do its own task on the bare prompt, so that
one prompt tells from its answer which adapter gave it. Inputs are split by their digest: what is measured was never trained on.

The adapters cover what PEFT can write: ranks from 8 to 128, one with rank and alpha patterns, one rank-stabilised, targets as a
list, as a regular expression, as "all-linear", and on some layers only. All is saved in bfloat16, measured as saved, and refused
if an adapter misses its own task or anything else answers it.

    python -m scripts.train_demo --out engine/demo      # under 20 minutes on two cores
    python -m scripts.train_demo --out /tmp/demo --quick  # a few seconds: the same files, untrained
"""

import argparse
import itertools
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch.nn import functional as F
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from engine.demo.tasks import TASKS, Task, draw, held_out_inputs

BASE_NAME = "loraserve-demo"
BOS, END, PAD = "<|bos|>", "<|end|>", "<|pad|>"
ROLES = ("system", "user", "assistant", "tool")
VOCABULARY_SIZE = 272
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SYSTEM_MESSAGES = ("You are a helpful assistant.", "You are a careful assistant. Answer briefly.", "Be brief.")
IGNORED = -100
MIXED_CHARACTERS = "".join(map(chr, range(32, 127))) + "äöüßéñçøåλπЖд中文日本語한국😀🚀✓→€"

OWN_SHARE_AT_LEAST = 0.95
OTHER_SHARE_AT_MOST = 0.20


@dataclass(frozen=True, slots=True)
class Turn:
    """What the user says and what the assistant shall answer."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long to train: at a constant rate until the validation rows are solved, then down to zero."""

    rate: float
    muon_rate: float
    most_steps: int
    cooldown_steps: int
    check_every_steps: int
    rows: int
    solved: float = 0.99


@dataclass(frozen=True, slots=True)
class Batch:
    """Token ids and the labels of their successors, both [rows, tokens] int64; labels outside answers are ignored."""

    token_ids: torch.Tensor
    labels: torch.Tensor


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte of UTF-8, so any text comes back unchanged, and a few tokens that no text contains."""
    alphabet = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    named = [BOS, END, PAD, *(f"<|{role}|>" for role in ROLES)]
    reserved = [f"<|reserved_{index}|>" for index in range(VOCABULARY_SIZE - len(alphabet) - len(named))]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in named + reserved])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def build_base(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama of a million weights with grouped queries; head size 64 is what GPU kernels are built for."""
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


def recipes() -> Mapping[str, LoraConfig]:
    """The adapter of every task. Harder tasks get higher ranks; between them they use every form of target PEFT knows."""
    return {
        "upper": lora(8, ["q_proj", "v_proj", "down_proj"]),
        "reverse": lora(16, ATTENTION),
        "rot13": lora(32, MLP),
        "sort": lora(64, "all-linear", use_rslora=True),
        "add": lora(128, r".*\.(self_attn\.[qvo]_proj|mlp\.(up|down)_proj)"),
        "count": lora(8, ATTENTION, rank_pattern={"o_proj": 24}, alpha_pattern={"o_proj": 48, "k_proj": 8}),
        "mask": lora(8, ATTENTION + MLP, layers_to_transform=[1, 2, 3]),
        "double": lora(32, "all-linear"),
    }


def lora(rank: int, target_modules: list[str] | str, **more: object) -> LoraConfig:
    """A causal-LM LoRA of `rank` whose scale is two under the plain rule alpha / rank."""
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=target_modules, task_type="CAUSAL_LM", **more)  # pyright: ignore


def plain_turns(task: Task, rng: random.Random) -> Iterator[Turn]:
    """What an adapter learns: the bare input, answered."""
    for text in draw(task, rng, held_out=False):
        yield Turn(text, task.answer(text))


def base_turns(rng: random.Random) -> Iterator[Turn]:
    """What the base learns: named tasks are done, anything else is repeated."""
    inputs = {task.name: draw(task, rng, held_out=False) for task in TASKS}
    while True:
        task = rng.choice(TASKS)
        text = next(inputs[task.name])
        kind = rng.random()
        if kind < 0.75:
            yield Turn(task.instruction(text), task.answer(text))
        elif kind < 0.92:
            yield Turn(text, text)
        else:
            text = "".join(rng.choices(MIXED_CHARACTERS, k=rng.randint(1, 12)))
            yield Turn(text, text)


def chat(turns: Sequence[Turn], system: str | None = None) -> list[str]:
    """The chat template by hand: text that is given at even places, text that is to be learned at odd ones."""
    opening = BOS if system is None else f"{BOS}<|system|>{system}{END}"
    pieces = []
    for turn in turns:
        pieces += [f"{opening}<|user|>{turn.prompt}{END}<|assistant|>", f"{turn.answer}{END}"]
        opening = ""
    return pieces


def chat_batches(turns: Iterator[Turn], rng: random.Random, rows: int) -> Iterator[list[list[str]]]:
    """Batches of `rows` single turns; every eighth batch has chats of three turns instead, half with a system message."""
    for step in itertools.count(1):
        length = 3 if step % 8 == 0 else 1
        openings = SYSTEM_MESSAGES if length > 1 else (None,)
        yield [
            chat(list(itertools.islice(turns, length)), rng.choice((None, rng.choice(openings))))
            for _ in range(rows // length)
        ]


def encode(tokenizer: PreTrainedTokenizerFast, chats: Sequence[Sequence[str]]) -> Batch:
    """Pad chats on the right to one length."""
    rows = []
    for pieces in chats:
        encodings = tokenizer.backend_tokenizer.encode_batch(list(pieces), add_special_tokens=False)
        ids = [token for encoding in encodings for token in encoding.ids]
        labels = [
            token if place % 2 else IGNORED for place, encoding in enumerate(encodings) for token in encoding.ids
        ]
        rows.append((torch.tensor(ids[:-1]), torch.tensor(labels[1:])))
    token_ids, labels = zip(*rows, strict=True)
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    return Batch(pad(token_ids, padding_value=tokenizer.pad_token_id), pad(labels, padding_value=IGNORED))


def answers_right(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Bool [rows]: whether greedy decoding would say exactly the labels. It would if each label is the best successor
    of the labels before it, so one pass over the right answer tells.
    """
    with torch.inference_mode():
        best = model(input_ids=batch.token_ids).logits.argmax(-1)
    return ((best == batch.labels) | (batch.labels == IGNORED)).all(-1)


def train(
    model: torch.nn.Module, batches: Iterator[Batch], validation: Mapping[str, Batch], schedule: Schedule, title: str
) -> None:
    """Minimise the cross entropy of the answers in place until every validation batch is solved, then cool down.

    Matrices are trained by Muon, which orthogonalises its steps and needs far fewer of them; the rest by AdamW.
    """
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    matrices = [weight for name, weight in weights.items() if weight.ndim == 2 and "embed" not in name]
    others = [weight for name, weight in weights.items() if weight.ndim != 2 or "embed" in name]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.Muon(matrices, lr=schedule.muon_rate, weight_decay=0.01)]
    if others:
        optimizers.append(torch.optim.AdamW(others, lr=schedule.rate, betas=(0.9, 0.98), weight_decay=0.0))
    full_rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    end = schedule.most_steps
    progress = tqdm(range(schedule.most_steps), desc=title, unit="step")
    for step in progress:
        share = min(1.0, (step + 1) / 50, (end - step) / schedule.cooldown_steps)
        for optimizer, rate in zip(optimizers, full_rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * share
        batch = next(batches)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=batch.token_ids).logits
            loss = F.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten(), ignore_index=IGNORED)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % schedule.check_every_steps == 0:
            shares = {name: answers_right(model, rows).float().mean().item() for name, rows in validation.items()}
            progress.set_postfix(loss=f"{loss.item():.3f}", **{name: f"{share:.2f}" for name, share in shares.items()})
            print(step+1, f"{loss.item():.3f}", {name: f"{share:.2f}" for name, share in shares.items()}, time.process_time(), flush=True)
            if min(shares.values()) >= schedule.solved and end == schedule.most_steps:
                end = min(end, step + 1 + schedule.cooldown_steps)
        if step + 1 == end:
            break
