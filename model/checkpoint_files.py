"""Find a checkpoint's files and read what is said of them: which model it is, and where its weights lie.

It reads no weights, and may not know torch: a router needs no more of a model than this.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, cast

from model.config import ModelConfig
from model.config_file import parse_config

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SPANS, _SPAN_BYTES = 64, 4096
_HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")


class CheckpointError(ValueError):
    """A checkpoint whose files do not hold the model that its config.json describes; says what to mend."""


def find_checkpoint(model: str) -> Path:
    """The folder of `model`: itself if it is a folder, else a snapshot of the hub model of that name.

    Raises CheckpointError when it is neither, when the hub cannot be reached, or without the `hub` extra.
    """
    folder = Path(model)
    if os.path.isdir(folder):  # noqa: PTH112 - Path.is_dir raises for names that are too long
        return folder
    if folder.is_absolute() or model.startswith(".") or model.count("/") > 1:
        raise CheckpointError(f"model={model!r} is not a folder: give one with a checkpoint, or a hub name")
    return _download(model)


def _download(model: str) -> Path:
    try:
        from huggingface_hub import snapshot_download  # noqa: PLC0415 - an optional dependency  # pyright: ignore[reportUnknownVariableType]
    except ImportError as error:
        remedy = "give a folder, or run scripts/setup hub, which installs what reads the hub"
        raise CheckpointError(
            f"model={model!r} is not a folder, and hub names need huggingface_hub: {remedy}"
        ) from error
    try:
        return Path(snapshot_download(model, allow_patterns=list(_HUB_FILES)))
    except (OSError, ValueError) as error:  # every error of the hub's client is one of these
        told = " ".join(str(error).split())
        raise CheckpointError(
            f"model={model!r} is not a folder and was not fetched from the hub: {told}"
        ) from error


def read_config(folder: Path) -> ModelConfig:
    """The model in `folder`, from its config.json and, for the end tokens, generation_config.json if it is
    there.

    Raises CheckpointError without a config.json, UnsupportedModel for what the forward pass cannot honour.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: give a folder with a Hugging Face checkpoint")
    generation = folder / "generation_config.json"
    return parse_config(read_json(path), read_json(generation) if generation.is_file() else {})


def find_weight_files(folder: Path) -> list[Path]:
    """Return the files that hold the weights. Raises CheckpointError where there are none."""
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if (folder / _INDEX).is_file():
        named: Any = read_json(folder / _INDEX).get("weight_map")
        shards = cast(dict[str, Any], named).values() if isinstance(named, dict) else ()
        if not shards or not all(isinstance(name, str) and Path(name).name == name for name in shards):
            raise CheckpointError(f"{folder / _INDEX} needs a weight_map from tensors to files of its folder")
        return [folder / name for name in sorted(set(shards))]
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
    found = f"{pickled[0]} is a pickle, which can run code and is never loaded; " if pickled else ""
    raise CheckpointError(
        f"{folder} has neither {_SINGLE} nor {_INDEX}: {found}convert the weights to safetensors"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object. Raises CheckpointError."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__}: it must be a JSON object")
    return cast(dict[str, Any], content)


def weights_digest(folder: Path) -> str:
    """Tells models with different weights apart without reading them whole: sha256 (hex) over each file's size and
    spans of 4 KiB spread evenly over it, the first of which lists its tensors."""
    found = hashlib.sha256()
    for path in find_weight_files(folder):
        size = path.stat().st_size
        found.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            for number in range(_SPANS):
                file.seek(size * number // _SPANS)
                found.update(file.read(_SPAN_BYTES))
    return found.hexdigest()
