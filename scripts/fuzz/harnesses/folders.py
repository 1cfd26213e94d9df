"""Try spoilt folders: adapters, checkpoints and tokenizers, of which one file at a time is spoilt."""

import json
import random
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

import safetensors.torch
import torch

from engine.assembly.tokenizer_loading import load_tokenizer
from engine.demo.embedded import DEMO_BASE, adapter_folders
from engine.errors import InvalidConfig
from engine.text.template_renderer import InvalidChat
from engine.tokenizer import PromptTooLong, TokenizerFailed
from lora.errors import AdapterRefused
from lora.format.adapter_files import WEIGHTS_FILE
from lora.format.peft import pack
from lora.format.peft_config import CONFIG_FILE, HONOURED, REFUSED
from model.checkpoint import load_weights
from model.checkpoint_files import CheckpointError, read_config
from model.config import UnsupportedModel
from scheduler.request import InvalidParameter
from scripts.fuzz.case import Case, Finding
from scripts.fuzz.mutators import file_spoiler

_MOST_ADAPTER_BYTES = 4 << 20
_INDEX = "model.safetensors.index.json"
_CONFIG_KEYS = (
    *(
        "rope_scaling",
        "rope_parameters",
        "sliding_window",
        "head_dim",
        "quantization_config",
        "tie_word_embeddings",
    ),
    *(
        "eos_token_id",
        "num_key_value_heads",
        "max_position_embeddings",
        "hidden_act",
        "layer_types",
        "torch_dtype",
    ),
)
_TOKENIZER_KEYS = (
    "chat_template",
    "eos_token",
    "bos_token",
    "added_tokens_decoder",
    "tokenizer_class",
    "normalizer",
)
Reader = Callable[[Path], object]


class FolderTarget:
    """A folder of which one file is spoilt at a time, and what reads it."""

    def __init__(
        self,
        folder: Path,
        read: Reader,
        refusals: tuple[type[Exception], ...],
        keys: Mapping[str, tuple[str, ...]],
    ) -> None:
        """Spoil the files that `keys` names, each with its further fields, in a copy of `folder`.

        `read` may raise `refusals`, whose words can be sent on, and nothing else.
        """
        self._root = Path(tempfile.mkdtemp(prefix="fuzz-"))
        self._folder = self._root / "folder"
        shutil.copytree(folder, self._folder)
        self._read, self._refusals = read, refusals
        self._whole = {name: (self._folder / name).read_bytes() for name in keys}
        self._spoilers = {name: file_spoiler(name, self._whole[name], keys[name]) for name in keys}

    def whole(self) -> list[Case]:
        """Return the files as they were."""
        return [Case(name, content) for name, content in self._whole.items()]

    def draw(self, chance: random.Random) -> Case:
        """Draw a file and a spoilt content of it."""
        name = chance.choice(list(self._spoilers))
        return Case(name, self._spoilers[name](chance))

    def run(self, case: Case) -> str:
        """Read the folder with the case's file in it."""
        if case.head not in self._whole:
            raise ValueError(f"{case.head!r} is no file of this target: give a case that it wrote")
        path = self._folder / case.head
        path.write_bytes(case.content)
        try:
            self._read(self._folder)
        except self._refusals as refusal:
            try:
                str(refusal).encode()
            except UnicodeEncodeError as error:
                raise Finding(f"the refusal cannot be sent on: {str(refusal)!r}") from error
            return "refused"
        finally:
            path.write_bytes(self._whole[case.head])
        return "taken"

    def check(self) -> None:
        """Nothing is left behind but the folder."""

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self._root, ignore_errors=True)


def adapters() -> FolderTarget:
    """Return the target of an adapter's two files."""
    base = read_config(DEMO_BASE).base_shape()

    def read(folder: Path) -> None:
        pack("adapter", folder, base, torch.float32, most_bytes=_MOST_ADAPTER_BYTES)

    fields = tuple(sorted(HONOURED | REFUSED.keys()))
    return FolderTarget(
        adapter_folders()["reverse"], read, (AdapterRefused,), {CONFIG_FILE: fields, WEIGHTS_FILE: ()}
    )


def checkpoints() -> FolderTarget:
    """Return the target of a checkpoint's files, its weights in two files with an index."""

    def read(folder: Path) -> None:
        load_weights(folder, read_config(folder), torch.float32, torch.device("cpu"), progress=False)

    keys = {"config.json": _CONFIG_KEYS, "generation_config.json": ("eos_token_id",), _INDEX: ()}
    with tempfile.TemporaryDirectory(prefix="fuzz-") as made:
        folder = _sharded(DEMO_BASE, Path(made) / "checkpoint")
        files = {path.name: () for path in folder.glob("*.safetensors")}
        return FolderTarget(
            folder, read, (CheckpointError, UnsupportedModel, InvalidConfig), {**keys, **files}
        )


def tokenizers() -> FolderTarget:
    """Return the target of a tokenizer's files, which also writes, reads and chats."""

    def read(folder: Path) -> None:
        with closing(load_tokenizer(folder)) as tokenizer:
            tokenizer.decode(tokenizer.encode("garden \U0001f600", most_tokens=64))
            if tokenizer.has_chat_template:
                tokenizer.encode_chat([{"role": "user", "content": "garden"}], most_tokens=64)

    refusals = (InvalidConfig, InvalidChat, InvalidParameter, PromptTooLong, TokenizerFailed)
    keys = {"tokenizer.json": _TOKENIZER_KEYS, "tokenizer_config.json": _TOKENIZER_KEYS}
    return FolderTarget(DEMO_BASE, read, refusals, keys)


def _sharded(source: Path, folder: Path) -> Path:
    """Copy a checkpoint, its tensors in two files."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = safetensors.torch.load_file(source / "model.safetensors")
    names = sorted(tensors)
    parts = {"part-1.safetensors": names[::2], "part-2.safetensors": names[1::2]}
    for file, members in parts.items():
        safetensors.torch.save_file(
            {name: tensors[name].contiguous() for name in members}, folder / file, {"format": "pt"}
        )
    index = {
        "metadata": {},
        "weight_map": {name: file for file, members in parts.items() for name in members},
    }
    (folder / _INDEX).write_text(json.dumps(index))
    return folder
