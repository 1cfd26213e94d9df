"""adapter_config.json: which modules an adapter has, with which rank and scale, or why it is not served.

Every field of PEFT's LoraConfig is either honoured here, listed as irrelevant to inference, or refused when it
is set; a field that this version does not know is refused when it is set. The room knows no tensor.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lora.target_modules import SITES

CONFIG_FILE = "adapter_config.json"

HONOURED = frozenset(
    {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"}
    | {"exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights", "bias"}
)
# How the adapter was trained or initialised, or where it came from: no part of y = W x + s B (A x). The settings
# of an initialisation are here too, since `init_lora_weights` says whether it was used.
IRRELEVANT = frozenset(
    {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
    | {"lora_dropout", "runtime_config", "megatron_core", "ensure_weight_tying", "qalora_group_size"}
    | {"loftq_config", "eva_config", "corda_config", "lora_ga_config"}
)
_MERGE = "merge it into the base model and serve that instead"
_RETRAIN = "train the adapter without it"
REFUSED: Mapping[str, tuple[str, str]] = {
    "use_dora": ("DoRA rescales the base weights", _MERGE),
    "modules_to_save": ("whole modules are replaced beside the LoRA", _RETRAIN),
    "trainable_token_indices": ("rows of the embedding are replaced", _RETRAIN),
    "lora_bias": ("B has a bias", _RETRAIN),
    "layer_replication": ("the base model's layers are repeated", _MERGE),
    "fan_in_fan_out": ("the weights are stored transposed, for Conv1D bases", "save it for a Linear base"),
    "target_parameters": ("parameters that are no modules are adapted", _RETRAIN),
    "megatron_config": ("the modules are Megatron's parallel ones", "convert it to the Hugging Face names"),
    "alora_invocation_tokens": ("an aLoRA acts only after its invocation tokens", _RETRAIN),
    "use_qalora": ("QALoRA pools its input", _RETRAIN),
    "use_bdlora": ("BD-LoRA's factors are block-diagonal", "expand them to dense A and B"),
    "monteclora_config": ("MonteCLoRA samples its factors", _RETRAIN),
    "kasa_config": ("KaSA truncates the base weights", _MERGE),
    "velora_config": ("VeLoRA keeps tensors beside A and B", _RETRAIN),
    "arrow_config": ("Arrow mixes several adapters", "load the adapters one by one"),
}
Number = TypeVar("Number", int, float)

_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")


class Flaw(ValueError):
    """Why a folder cannot be served, before anyone asks under which name."""


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """What adapter_config.json says about modules, ranks and scales, with PEFT's rules of matching.

    `target_modules` and `exclude_modules` are a regex or names; `layers` is None where all layers are meant.
    """

    r: int
    alpha: float
    use_rslora: bool
    rank_pattern: tuple[tuple[str, int], ...]
    alpha_pattern: tuple[tuple[str, float], ...]
    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...]
    layers: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]

    def targets(self, path: str) -> bool:
        """Whether the module at `path` (such as `model.layers.0.self_attn.q_proj`) is adapted."""
        if self.exclude_modules and _names(self.exclude_modules, path):
            return False
        if isinstance(self.target_modules, str):
            if self.target_modules.lower() == "all-linear":
                return path.rsplit(".", 1)[-1] in SITES
            return _names(self.target_modules, path)
        # A full path names its module whatever `layers_to_transform` says; a suffix does not.
        return path in self.target_modules or (_names(self.target_modules, path) and self._in_layers(path))

    def rank(self, path: str) -> int:
        """The rank of the module at `path`."""
        return _first_match(self.rank_pattern, path, self.r)

    def scale(self, path: str) -> float:
        """Return alpha / r, or alpha / sqrt(r) with rsLoRA (Kalajdzievski, arXiv 2312.03732)."""
        rank, alpha = self.rank(path), _first_match(self.alpha_pattern, path, self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def _in_layers(self, path: str) -> bool:
        if self.layers is None:
            return True
        for pattern in self.layers_pattern or (r"[^.]*",):
            if found := re.match(rf"(?:.*?\.)??(?:{pattern})\.(\d+)\.", path):
                return int(found[1]) in self.layers
        return False


def read_settings(folder: Path) -> LoraSettings:
    """Read and check `folder`'s adapter_config.json. Raises Flaw."""
    config = _read_config(folder)
    _check_kind(config)
    for field, value in config.items():
        if field in REFUSED and value:
            reason, remedy = REFUSED[field]
            raise Flaw(f"{CONFIG_FILE} sets {field}={_short(value)}: {reason}, which is not served; {remedy}")
        if field not in REFUSED and field not in HONOURED and field not in IRRELEVANT and value:
            raise Flaw(
                f"{CONFIG_FILE} sets {field}={_short(value)}, a field that this version does not know:"
                " it may change the arithmetic; remove it if it does not"
            )
    targets, layers = _names_field(config, "target_modules"), _layers_field(config)
    if not targets:
        raise Flaw(f"{CONFIG_FILE} names no target_modules: list the modules that were trained")
    if isinstance(targets, str) and layers is not None:
        raise Flaw(f"{CONFIG_FILE} has layers_to_transform with target_modules as a regex: use one of them")
    return LoraSettings(
        r=_rank(config.get("r"), "r"),
        alpha=_alpha(config.get("lora_alpha"), "lora_alpha"),
        use_rslora=_flag(config, "use_rslora"),
        rank_pattern=tuple(
            (k, _rank(v, f"rank_pattern[{k!r}]")) for k, v in _pattern(config, "rank_pattern")
        ),
        alpha_pattern=tuple(
            (k, _alpha(v, f"alpha_pattern[{k!r}]")) for k, v in _pattern(config, "alpha_pattern")
        ),
        target_modules=targets,
        exclude_modules=_names_field(config, "exclude_modules"),
        layers=layers,
        layers_pattern=_layers_pattern(config),
    )


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise Flaw(f"{folder} is not a folder: give the folder that holds {CONFIG_FILE}")
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Flaw(f"{folder} has no {CONFIG_FILE}: give a folder saved by PEFT's save_pretrained") from None
    except OSError as error:
        raise Flaw(f"{path} cannot be read ({error.strerror}): check its permissions") from error
    except ValueError as error:  # not JSON, or not even text
        raise Flaw(f"{path} is not valid JSON ({error}): save the adapter again") from error
    if not isinstance(config, dict):
        raise Flaw(f"{path} holds {type(config).__name__}, not an object of fields: save the adapter again")
    return config


def _check_kind(config: dict[str, Any]) -> None:
    kind, bias, init = (
        config.get("peft_type"),
        config.get("bias", "none"),
        config.get("init_lora_weights", True),
    )
    if kind != "LORA":
        raise Flaw(f"{CONFIG_FILE} has peft_type={kind!r}: only 'LORA' is served")
    if bias not in ("none", None):
        raise Flaw(
            f"{CONFIG_FILE} has bias={bias!r}: the base model's biases are trained too; use bias='none'"
        )
    if init in _HARMLESS_INITS:
        return
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        raise Flaw(
            f"{CONFIG_FILE} has init_lora_weights={init!r}, which changed the base weights at the start of the"
            " training: convert it with save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    raise Flaw(f"{CONFIG_FILE} has init_lora_weights={_short(init)}, which this version does not know")


def _names_field(config: dict[str, Any], field: str) -> str | tuple[str, ...]:
    """A regex (checked), or a tuple of names; empty where the field is unset."""
    value = config.get(field) or ()
    if isinstance(value, str):
        _check_regex(field, value)
        return value
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise Flaw(f"{CONFIG_FILE} has {field}={_short(value)}: give a list of names or a regex")
    return tuple(value)


def _layers_field(config: dict[str, Any]) -> tuple[int, ...] | None:
    value = config.get("layers_to_transform")
    if value is None or value == []:
        return None
    layers = value if isinstance(value, list) else [value]
    if not all(_is_int(layer) and layer >= 0 for layer in layers):
        raise Flaw(f"{CONFIG_FILE} has layers_to_transform={_short(value)}: give layer numbers from 0")
    return tuple(layers)


def _layers_pattern(config: dict[str, Any]) -> tuple[str, ...]:
    patterns = config.get("layers_pattern") or ()
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    if not isinstance(patterns, list | tuple) or not all(isinstance(pattern, str) for pattern in patterns):
        raise Flaw(f"{CONFIG_FILE} has layers_pattern={_short(patterns)}: give a name or a list of names")
    for pattern in patterns:
        _check_regex("layers_pattern", pattern)
    return tuple(patterns)


def _pattern(config: dict[str, Any], field: str) -> tuple[tuple[str, Any], ...]:
    value = config.get(field) or {}
    if not isinstance(value, dict):
        raise Flaw(f"{CONFIG_FILE} has {field}={_short(value)}: give an object of module names and numbers")
    for key in value:
        _check_regex(field, key)
    return tuple(value.items())


def _rank(value: object, field: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise Flaw(f"{CONFIG_FILE} has {field}={_short(value)}: a rank is a whole number from 1")
    return value


def _alpha(value: object, field: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise Flaw(f"{CONFIG_FILE} has {field}={_short(value)}: give the number that the training used")
    return float(value)


def _flag(config: dict[str, Any], field: str) -> bool:
    value = config.get(field) or False
    if not isinstance(value, bool):
        raise Flaw(f"{CONFIG_FILE} has {field}={_short(value)}: give true or false")
    return value


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_regex(field: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise Flaw(f"{CONFIG_FILE} has an invalid regex {pattern!r} in {field} ({error})") from error


def _names(wanted: str | tuple[str, ...], path: str) -> bool:
    """Whether a regex matches the whole path, or a name is the path or its dotted end."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in wanted)


def _first_match(pattern: tuple[tuple[str, Number], ...], path: str, default: Number) -> Number:
    """The number of the first key that, as a regex, matches the path or its dotted end."""
    for key, number in pattern:
        if re.match(rf"(.*\.)?({key})$", path):
            return number
    return default


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
