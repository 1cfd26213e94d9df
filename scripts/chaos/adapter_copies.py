"""Make many adapters of the embedded ones: other ranks and other contents, the same function.

A copy has rows of zeros added to A, and columns of zeros to B, up to its rank. Then the rows of A, and with them the
columns of B, are put in another order and change their signs. So B A is the same matrix to the last bit.
"""

# The types of safetensors are incomplete.
# pyright: reportUnknownVariableType=false

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file, save_file

from engine.demo.embedded import TASKS, Task, adapter_folders
from lora.format.adapter_files import WEIGHTS_FILE
from lora.format.peft_config import CONFIG_FILE, LoraSettings, read_settings

RANKS = (8, 16, 32, 64, 128)
_PREFIX = "base_model.model."
_SCALE = 2.0  # of every module of a copy; the embedded adapters' scales are powers of two


@dataclass(frozen=True, slots=True)
class AdapterCopy:
    """A copy: its name, the task that it does, and its rank."""

    name: str
    task: Task
    rank: int


def plan_copies(amount: int, seed: int) -> tuple[AdapterCopy, ...]:
    """Choose ranks in equal number, and for each the task that has fewest copies of those whose own ranks allow it."""
    rng, least = Random(seed), {name: _most_rank(folder) for name, folder in adapter_folders().items()}
    owed = [RANKS[at % len(RANKS)] for at in range(amount)]
    rng.shuffle(owed)
    copies: list[AdapterCopy] = []
    made: Counter[str] = Counter()
    for at, rank in enumerate(owed):
        task = min((each for each in TASKS if least[each.name] <= rank), key=lambda each: made[each.name])
        made[task.name] += 1
        copies.append(AdapterCopy(f"{task.name}-r{rank}-{at}", task, rank))
    return tuple(copies)


def write_copies(copies: Sequence[AdapterCopy], folder: Path, seed: int) -> None:
    """Write each copy's PEFT folder below `folder`, where it is not there yet."""
    folders = adapter_folders()
    tensors = {name: load_file(path / WEIGHTS_FILE) for name, path in folders.items()}
    for copy in copies:
        target, original = folder / copy.name, folders[copy.task.name]
        if (target / CONFIG_FILE).exists():
            continue
        target.mkdir(parents=True, exist_ok=True)
        rng = Random(f"{copy.name}/{seed}")
        changed = _changed(tensors[copy.task.name], read_settings(original), copy.rank, rng)
        save_file(changed, target / WEIGHTS_FILE)
        config = json.loads((original / CONFIG_FILE).read_text())
        config |= {"r": copy.rank, "lora_alpha": _SCALE * copy.rank, "use_rslora": False}
        config |= {"rank_pattern": {}, "alpha_pattern": {}}
        # Last: a folder with a configuration is complete.
        (target / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n")


def _changed(
    tensors: Mapping[str, torch.Tensor], settings: LoraSettings, rank: int, rng: Random
) -> dict[str, torch.Tensor]:
    """Return the weights of a copy of that rank. A is [rank, in], B is [out, rank]."""
    changed: dict[str, torch.Tensor] = {}
    for key, a in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        module = key.removesuffix(".lora_A.weight")
        b = tensors[f"{module}.lora_B.weight"]
        order = rng.sample(range(rank), rank)
        signs = torch.tensor([rng.choice((-1.0, 1.0)) for _ in range(rank)], dtype=a.dtype)
        wide_a = torch.zeros(rank, a.shape[1], dtype=a.dtype)
        wide_b = torch.zeros(b.shape[0], rank, dtype=b.dtype)
        wide_a[: a.shape[0]] = a
        wide_b[:, : a.shape[0]] = b * (settings.scale(module.removeprefix(_PREFIX)) / _SCALE)
        changed[key] = (wide_a[order] * signs[:, None]).contiguous()
        changed[f"{module}.lora_B.weight"] = (wide_b[:, order] * signs).contiguous()
    return changed


def _most_rank(folder: Path) -> int:
    """Return the largest rank of a folder's modules."""
    settings = read_settings(folder)
    return max([settings.r, *(rank for _, rank in settings.rank_pattern)])
