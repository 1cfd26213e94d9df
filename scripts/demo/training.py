"""Train the embedded model: the base until it does every task by name, and each adapter until it does its own.

Knows nothing of what is measured afterwards.
"""

# The types of torch, transformers, tokenizers and tqdm are incomplete.
# pyright: reportUnknownMemberType=false

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from torch.nn import functional as F
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from engine.demo.embedded import TASKS, Task, held_out_inputs
from scripts.demo.lessons import (
    BOS,
    END,
    IGNORED,
    PAD,
    VOCABULARY_SIZE,
    Batch,
    Turn,
    adapter_turns,
    bare_questions,
    base_turns,
    build_tokenizer,
    endless_batches,
    question_batch,
    save_tokenizer,
)

BASE_NAME = "loraserve-demo"
SOLVED_SHARE = 0.99


@dataclass(frozen=True, slots=True)
class Lesson:
    """What to learn, and the batches that tell when it is learned."""

    title: str
    batches: Iterator[Batch]
    validation: Mapping[str, Batch]


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long to train: at a constant rate until the validation batches are solved, then down to nothing."""

    rows: int
    warmup_steps: int
    cooldown_steps: int
    most_steps: int
    check_every_steps: int
    check_inputs: int = 96


BASE_SCHEDULE = Schedule(rows=128, warmup_steps=40, cooldown_steps=500, most_steps=850, check_every_steps=50)
ADAPTER_SCHEDULE = Schedule(rows=64, warmup_steps=10, cooldown_steps=60, most_steps=400, check_every_steps=20)


def quick(schedule: Schedule) -> Schedule:
    """Shorten to too few steps to learn anything, and enough to run every line."""
    return replace(
        schedule, rows=8, warmup_steps=1, cooldown_steps=1, most_steps=2, check_every_steps=2, check_inputs=2
    )


def recipes() -> Mapping[str, LoraConfig]:
    """Give each task's adapter: no two alike, and among them every way of choosing ranks, scales and targets."""
    lora = partial(LoraConfig, task_type="CAUSAL_LM")
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    mlp = ["gate_proj", "up_proj", "down_proj"]
    ranks, alphas = {"o_proj": 24}, {"o_proj": 48, "k_proj": 8}
    regex = r".*\.(self_attn\.[qvo]_proj|mlp\.(up|down)_proj)"
    return {
        "upper": lora(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
        "count": lora(r=8, lora_alpha=16, target_modules=attention, rank_pattern=ranks, alpha_pattern=alphas),
        "mask": lora(r=8, lora_alpha=16, target_modules=attention + mlp, layers_to_transform=[1, 2, 3]),
        "reverse": lora(r=16, lora_alpha=32, target_modules=attention),
        "swap": lora(r=32, lora_alpha=64, target_modules="all-linear"),
        "rot13": lora(r=32, lora_alpha=64, target_modules=mlp),
        "sort": lora(r=64, lora_alpha=16, target_modules=attention + mlp, use_rslora=True),
        "increment": lora(r=128, lora_alpha=256, target_modules=regex),
    }


def build_base(tokenizer: Tokenizer) -> LlamaForCausalLM:
    """Build an untrained Llama of a million weights, with grouped queries and the smallest heads that kernels take."""
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
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(END),
        pad_token_id=tokenizer.token_to_id(PAD),
    )
    model = LlamaForCausalLM(config)
    # On CPU its backward pass takes a third of the fused kernel's time.
    model.set_attn_implementation("eager")
    return model


def share_right(model: torch.nn.Module, batch: Batch) -> float:
    """Compute the share of the rows that greedy decoding answers without a fault.

    Decoding gives exactly the labels if each is the likeliest successor of those before it. So one pass over
    the right answers is enough.
    """
    with torch.inference_mode():
        likeliest = model(input_ids=batch.tokens).logits.argmax(-1)
    right = (likeliest == batch.labels) | (batch.labels == IGNORED)
    return right.all(-1).float().mean().item()


def learn(model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer], batch: Batch) -> float:
    """Take one step of every optimizer on the mean cross entropy of the labels, and return that."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=batch.tokens).logits
    loss = F.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten(), ignore_index=IGNORED)
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def train(
    model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer], lesson: Lesson, schedule: Schedule
) -> None:
    """Learn the lesson in place, until every validation batch is solved and the rates have cooled down."""
    full_rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    end = schedule.most_steps
    progress = tqdm(range(end), desc=lesson.title, unit="step", mininterval=1.0)
    for step in progress:
        if step == end:
            break
        share = min(1.0, (step + 1) / schedule.warmup_steps, (end - step) / schedule.cooldown_steps)
        for optimizer, rate in zip(optimizers, full_rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * share
        loss = learn(model, optimizers, next(lesson.batches))
        if (step + 1) % schedule.check_every_steps == 0:
            shares = {name: share_right(model, batch) for name, batch in lesson.validation.items()}
            progress.set_postfix(
                {"loss": f"{loss:.3f}"} | {name: f"{share:.2f}" for name, share in shares.items()}
            )
            if min(shares.values()) >= SOLVED_SHARE:
                end = min(end, step + 1 + schedule.cooldown_steps)


def make_base(out: Path, seed: int, schedule: Schedule) -> None:
    """Train the base and write it, with its tokenizer, to `out/base`."""
    torch.manual_seed(seed)
    rng = Random(seed)
    tokenizer = build_tokenizer()
    model = build_base(tokenizer)
    matrices = [
        weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name
    ]
    others = [weight for name, weight in model.named_parameters() if weight.ndim != 2 or "embed" in name]
    # Muon's orthogonal steps learn the tasks in far fewer of them than Adam's, but are for matrices alone.
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.01),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    inputs = {task: held_out_inputs(task, schedule.check_inputs, seed=1) for task in TASKS}
    validation = {
        task.name: question_batch(
            tokenizer, [Turn(task.instruction(text), task.answer(text)) for text in texts]
        )
        for task, texts in inputs.items()
    }
    validation["echo"] = question_batch(
        tokenizer, [Turn(text, text) for texts in inputs.values() for text in texts[:16]]
    )
    batches = endless_batches(tokenizer, base_turns(rng), rng, schedule.rows)
    train(model, optimizers, Lesson("base", batches, validation), schedule)
    model.bfloat16().save_pretrained(out / "base")
    save_tokenizer(tokenizer, out / "base")


def make_adapter(out: Path, task: Task, seed: int, schedule: Schedule) -> None:
    """Train the adapter of `task` on the base in `out` and write it there; for a process of its own."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rng = Random(f"{task.name}/{seed}")
    tokenizer = Tokenizer.from_file(str(out / "base" / "tokenizer.json"))
    base = LlamaForCausalLM.from_pretrained(out / "base", dtype=torch.float32, attn_implementation="eager")
    base.name_or_path = BASE_NAME
    recipe = recipes()[task.name]
    model = get_peft_model(base, recipe)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    rate = 0.02 / recipe.r**0.5  # the more rank rows move at a time, the smaller the step of each
    optimizers = [torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)]
    validation = {"right": bare_questions(tokenizer, task, schedule.check_inputs, seed=1)}
    batches = endless_batches(tokenizer, adapter_turns(task, rng), rng, schedule.rows)
    train(model, optimizers, Lesson(task.name, batches, validation), schedule)
    save_adapter(model, recipe, out / "adapters" / task.name)


def save_adapter(model: PeftModel, recipe: LoraConfig, folder: Path) -> None:
    """Write the adapter as PEFT does, but with targets in a fixed order and without the empty model card."""
    if not isinstance(recipe.target_modules, str):
        recipe.target_modules = sorted(recipe.target_modules or ())
    model.bfloat16().save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
