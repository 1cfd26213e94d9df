"""Say what clients are told of the base model: its names, where it came from, its limits and its end tokens.

It may not know torch: a router tells the same of a model that other processes compute.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.config.config import EngineConfig
from engine.config.option_types import is_folder
from engine.demo.embedded import DEMO_BASE
from engine.errors import InvalidConfig
from model.checkpoint_files import find_checkpoint
from model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What is told of the base model; requests may call it by any of its names, the first of which responses use."""

    names: tuple[str, ...]
    root: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]


def model_card(
    config: EngineConfig, model: ModelConfig, folder: Path, longest: int, tokenizer_ends: Sequence[int]
) -> ModelCard:
    """Describe the base model; sequences end with what its files or its tokenizer name. Raises InvalidConfig."""
    return ModelCard(
        names=base_names(config),
        root=str(config.model or folder),
        max_model_len=longest,
        vocab_size=model.vocab_size,
        eos_token_ids=tuple(dict.fromkeys((*model.eos_token_ids, *tokenizer_ends))),
    )


def base_folder(config: EngineConfig) -> Path:
    """Return the folder of the base model that `config` names. Raises CheckpointError."""
    return DEMO_BASE if config.model is None else find_checkpoint(str(config.model))


def base_names(config: EngineConfig) -> tuple[str, ...]:
    """Return the base's names. Unlike an adapter's they may be any printable text. Raises InvalidConfig."""
    names = _written_names(config)
    for name in names:
        if not name.isprintable():
            remedy = "the base model's name is no printable text: give another with --served-model-name"
            raise InvalidConfig("served_model_name", name, remedy)
    return names


def _written_names(config: EngineConfig) -> tuple[str, ...]:
    """Return the base's names as they were written: a folder's last part, links not followed, or the hub id."""
    if config.served_model_name:
        given = config.served_model_name
        return (given,) if isinstance(given, str) else tuple(dict.fromkeys(given))
    if config.model is None:
        return ("demo",)
    if not is_folder(config.model):
        return (str(config.model),)
    return (Path(os.path.abspath(config.model)).name or str(config.model),)  # noqa: PTH100 - keeps links
