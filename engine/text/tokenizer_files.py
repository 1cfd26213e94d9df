"""Read a model's tokenizer files, which may be spoilt in any way, or say in one line why they cannot be used.

A tokenizer.json is read as it is. A SentencePiece model without one (tokenizer.model, as Llama 2 and Mistral were
published) is converted, such that its tokens are those of SentencePiece itself.
"""

import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from transformers import PreTrainedTokenizerFast

from engine.errors import EngineError, InvalidConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_TOKENIZER_FILE, _SENTENCEPIECE_FILE = "tokenizer.json", "tokenizer.model"
_CONFIG_FILE = "tokenizer_config.json"
_PLAIN = ("PreTrainedTokenizerFast", "TokenizersBackend")  # two names of one class
_REMEDY = f"give a folder with a {_TOKENIZER_FILE} or a {_SENTENCEPIECE_FILE}"


def read_tokenizer(model: str | Path) -> PreTrainedTokenizerFast:
    """Read the tokenizer of a model folder, without the network, or of a hub id. Raises InvalidConfig."""
    folder = Path(model)
    converts = (folder / _SENTENCEPIECE_FILE).is_file() and not (folder / _TOKENIZER_FILE).is_file()
    with readable(model):
        made: object = _convert(folder) if converts else _read(str(model))
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


def _read(model: str) -> object:
    folder = Path(model)
    config, told = _entries(folder / "config.json"), _entries(folder / _CONFIG_FILE)
    if config.get("model_type") == "llama" and _is_plain(told) and (folder / _TOKENIZER_FILE).is_file():
        # What is chosen for these below too, without importing torch.
        return PreTrainedTokenizerFast.from_pretrained(model, local_files_only=True)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    from transformers import AutoTokenizer  # noqa: PLC0415 - imports torch, which a router may do without

    # transformers leaves what follows untyped. Code that comes with a model is not run.
    return AutoTokenizer.from_pretrained(  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        model, config=_naming(model, config, told), local_files_only=folder.is_dir(), trust_remote_code=False
    )


def _is_plain(told: Mapping[str, Any]) -> bool:
    """Return whether a tokenizer's configuration names a class that takes tokenizer.json as it is."""
    return told.get("tokenizer_class") in _PLAIN and "auto_map" not in told


def _naming(model: str, config: Mapping[str, Any], told: Mapping[str, Any]) -> "PreTrainedConfig | None":
    """Return what a folder's config.json says of its tokenizer, where tokenizer_config.json names a class.

    transformers would otherwise import its code of the model's family to find that out, which takes seconds.
    """
    from transformers import PreTrainedConfig  # noqa: PLC0415 - imports torch, see above

    if not (config and told.get("tokenizer_class")):
        return None
    made = PreTrainedConfig()
    made.name_or_path = str(Path(model))
    for key in ("model_type", "model_name", "tokenizer_class"):
        if key in config:
            setattr(made, key, config[key])
    return made


def _convert(folder: Path) -> object:
    """Convert a SentencePiece model. BOS stands in front unless the configuration says otherwise, as in Llama 2.

    "Legacy" is the conversion in which a text that begins with a space keeps it.
    """
    adds = _entries(folder / _CONFIG_FILE).get("add_bos_token", True)
    return PreTrainedTokenizerFast.from_pretrained(  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        str(folder), local_files_only=True, legacy=True, add_bos_token=adds
    )


def _entries(path: Path) -> dict[str, Any]:
    """Read a file of JSON; empty where there is none, or no object in it."""
    found: Any = json.loads(path.read_text()) if path.is_file() else {}
    return cast(dict[str, Any], found) if isinstance(found, dict) else {}
