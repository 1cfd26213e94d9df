"""Make the benchmarks' inputs from a seed: random Llama checkpoints of known shape, and LoRA adapters of every rank.

Speed does not depend on what weights say, so they are drawn, not trained. Scales keep activations of order
one and the likeliest token clear of the next, so that greedy answers of different engines can be compared.
Files are in the layouts that every engine reads: a Hugging Face checkpoint with tokenizer, PEFT folders, and
an index of the adapters.

    python -m scripts.bench.make_models --sizes 100m,1b --out build/bench

writes `OUT/SIZE/`, `OUT/SIZE-adapters/NAME/` and `OUT/SIZE-adapters/index.json`, a list of {"name", "path",
"rank"}.
"""

# The types of transformers, tokenizers and safetensors are incomplete.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import argparse
import itertools
import json
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from tqdm import tqdm
from transformers import LlamaConfig, PreTrainedTokenizerFast

from scripts.arguments import count, one_line, some_of
from scripts.bench.llama import RANKS, SHAPES, VOCABULARY_SIZE, LlamaShape, index_of

BOS, EOS, PAD, HEADER, END_HEADER = "<|bos|>", "<|eos|>", "<|pad|>", "<|role|>", "<|text|>"
SPECIAL_TOKENS = (BOS, EOS, PAD, HEADER, END_HEADER)
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}<|role|>{{ message['role'] }}<|text|>{{ message['content'] }}<|eos|>{% endfor %}"
    "{% if add_generation_prompt %}<|role|>assistant<|text|>{% endif %}"
)
GAINS = {"lm_head": 2.0, "o_proj": 0.5, "down_proj": 0.5, "lora_A": 1.0, "lora_B": 0.1}
"""Standard deviation of a matrix times the root of its inputs; 1 for those not named, but for the
embedding."""


def draw(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Draw one bfloat16 tensor that depends on its name, its shape and the seed alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 1:  # a norm: near one, but not one, so that a dropped weight shows
        return (1 + 0.1 * noise).to(torch.bfloat16)
    if "embed_tokens" in name:
        return noise.to(torch.bfloat16)
    gain = next((gain for part, gain in GAINS.items() if part in name), 1.0)
    return noise.mul_(gain / math.sqrt(shape[1])).to(torch.bfloat16)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a byte-level tokenizer whose further tokens are two and three printable characters.

    So any id but the special ones has a text, and no corpus is needed.
    """
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    pairs = list(itertools.product(letters, letters))
    triples = [(first + second, third) for (first, second), third in itertools.product(pairs, letters)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = (pairs + triples)[: VOCABULARY_SIZE - len(SPECIAL_TOKENS) - len(alphabet)]
    tokens = [*alphabet, *("".join(merge) for merge in merges)]
    tokenizer = Tokenizer(
        models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )


def build_config(shape: LlamaShape, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Build the checkpoint's config.json."""
    named = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    special: dict[str, Any] = {
        field: tokenizer.convert_tokens_to_ids(token) for field, token in named.items()
    }
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=VOCABULARY_SIZE,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head,
        intermediate_size=shape.intermediate,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=False,
        dtype="bfloat16",
        **special,
    )


def make_base(shape: LlamaShape, folder: Path, seed: int) -> None:
    """Write a checkpoint with its tokenizer."""
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    build_config(shape, tokenizer).save_pretrained(folder)
    named = tqdm(list(shape.weights()), desc=folder.name, unit="tensor")
    weights = {name: draw(name, size, seed) for name, size in named}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    parameters = sum(weight.numel() for weight in weights.values())
    print(f"{folder}: {parameters / 1e6:.1f} M parameters")


def make_adapter(shape: LlamaShape, rank: int, base: Path, folder: Path, seed: int) -> None:
    """Write one PEFT folder."""
    folder.mkdir(parents=True, exist_ok=True)
    sites = [path.rpartition(".")[2] for path in shape.projections]
    LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=sites,
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base.resolve()),
        inference_mode=True,
    ).save_pretrained(str(folder))
    weights = {name: draw(name, size, seed) for name, size in shape.lora_weights(rank)}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def make_adapters(shape: LlamaShape, base: Path, amount: int, seed: int) -> None:
    """Write `amount` adapters, their ranks going round, and their index."""
    root = index_of(base).parent
    index: list[dict[str, str | int]] = []
    for number in tqdm(range(amount), desc=root.name, unit="adapter"):
        rank = RANKS[number % len(RANKS)]
        folder = root / f"a{number:02d}-r{rank}"
        make_adapter(shape, rank, base, folder, seed + 1 + number)
        index.append({"name": folder.name, "path": str(folder.resolve()), "rank": rank})
    index_of(base).write_text(json.dumps(index, indent=1))


def main(arguments: Sequence[str] | None = None) -> None:
    """Make what the command line asks for; what is complete already is kept."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sizes",
        type=some_of(SHAPES),
        default=["100m", "1b"],
        help=f"comma-separated, of {', '.join(SHAPES)}",
    )
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    parser.add_argument("--adapters", type=count, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="make again what exists")
    options = parser.parse_args(arguments)
    for size in options.sizes:
        base = options.out / size
        if index_of(base).exists() and not options.force:
            print(f"{base}: exists (--force makes it again)")
            continue
        make_base(SHAPES[size], base, options.seed)
        make_adapters(SHAPES[size], base, options.adapters, options.seed)


if __name__ == "__main__":
    with one_line("scripts.bench.make_models"):
        main()
