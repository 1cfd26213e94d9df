"""Read a model's tokenizer files, which may be spoilt in any way, or say in one line why they cannot be used.

A tokenizer.json is read as it is. A SentencePiece model without one (tokenizer.model, as Llama 2 and Mistral were
published) is converted, such that its tokens are those of SentencePiece itself.
"""

import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from engine.errors import EngineError, InvalidConfig

_TOKENIZER_FILE, _SENTENCEPIECE_FILE = "tokenizer.json", "tokenizer.model"
_REMEDY = f"give a folder with a {_TOKENIZER_FILE} or a {_SENTENCEPIECE_FILE}"


def read_tokenizer(model: str | Path) -> PreTrainedTokenizerFast:
    """Read the tokenizer of a model folder, without the network, or of a hub id. Raises InvalidConfig."""
    folder = Path(model)
    converts = (folder / _SENTENCEPIECE_FILE).is_file() and not (folder / _TOKENIZER_FILE).is_file()
    with readable(model):
        made: object = _convert(folder) if converts else _read(str(model), folder.is_dir())
    if not isinstance(made, PreTrainedTokenizerFast):
        raise InvalidConfig("model", str(model), f"its tokenizer is no fast one: {_REMEDY}")
    return made


@contextmanager
def readable(model: str | Path) -> Generator[None]:
    """Raise InvalidConfig, in one line, for whatever the libraries raise for a tokenizer that is spoilt."""
    try:
        yield
    except EngineError:
        raise
    except BaseException as error:
        # A panic of the tokenizers library is no Exception; nothing else that is none is kept back.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise InvalidConfig(
            "model", str(model), f"its tokenizer cannot be read ({reason}): {_REMEDY}"
        ) from error


def _read(model: str, is_folder: bool) -> object:
    # transformers leaves what follows untyped. Code that comes with a model is not run.
    return AutoTokenizer.from_pretrained(  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        model, local_files_only=is_folder, trust_remote_code=False
    )


def _convert(folder: Path) -> object:
    """Convert a SentencePiece model. BOS stands in front unless the configuration says otherwise, as in Llama 2.

    "Legacy" is the conversion in which a text that begins with a space keeps it.
    """
    path = folder / "tokenizer_config.json"
    config: Any = json.loads(path.read_text()) if path.is_file() else {}
    adds = config.get("add_bos_token", True)
    return PreTrainedTokenizerFast.from_pretrained(  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        str(folder), local_files_only=True, legacy=True, add_bos_token=adds
    )
