"""adapter_config.json: which modules an adapter has, with which rank and scale, or why it is not served.

Every field of PEFT's LoraConfig is either honoured here, listed as irrelevant to inference, or refused when it
is set; a field that this version does not know is refused when it is set. The room knows no tensor.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard, TypeVar, cast

from lora.activation import MOST_INVOCATION_TOKENS
from lora.format.adapter_files import Flaw, read_json_object, short, unreadable
from lora.format.allowed_roots import ANYWHERE, AllowedRoots
from lora.format.module_patterns import (
    EndPattern,
    ModulePattern,
    compile_end_pattern,
    compile_pattern,
    is_literal,
)
from lora.target_modules import SITES

CONFIG_FILE = "adapter_config.json"
INVOCATION_FIELD = "alora_invocation_tokens"

HONOURED = frozenset(
    {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"}
    | {"exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights", "bias"}
    | {INVOCATION_FIELD, "ensure_weight_tying"}
)
# How the adapter was trained or initialised, or where it came from: no part of y = W x + s B (A x). The settings
# of an initialisation are here too, since `init_lora_weights` says whether it was used.
IRRELEVANT = frozenset(
    {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
    | {"lora_dropout", "runtime_config", "megatron_core", "qalora_group_size"}
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
    "use_qalora": ("QALoRA pools its input", _RETRAIN),
    "use_bdlora": ("BD-LoRA's factors are block-diagonal", "expand them to dense A and B"),
    "monteclora_config": ("MonteCLoRA samples its factors", _RETRAIN),
    "kasa_config": ("KaSA truncates the base weights", _MERGE),
    "velora_config": ("VeLoRA keeps tensors beside A and B", _RETRAIN),
    "arrow_config": ("Arrow mixes several adapters", "load the adapters one by one"),
}
Number = TypeVar("Number", int, float)

_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
ALL_LINEAR = "all-linear"
_MOST_NUMBER = 1_000_000  # a rank or a layer; beyond any model's
_MOST_ALPHA = 1e38
_MOST_TOKEN_ID = 2**31 - 1
_MOST_PATTERNS = 4096
_MOST_REGEX_CHARS = 8192
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """What adapter_config.json says about modules, ranks and scales, with PEFT's rules of matching.

    `target_modules` and `exclude_modules` are a pattern or names; `layers` is None where all layers are meant.
    `invocation` are an activated LoRA's tokens, else none. With `ties` the head may have the embedding's LoRA too.
    """

    r: int
    alpha: float
    use_rslora: bool
    rank_pattern: tuple[tuple[EndPattern, int], ...]
    alpha_pattern: tuple[tuple[EndPattern, float], ...]
    target_modules: ModulePattern | frozenset[str]
    exclude_modules: ModulePattern | frozenset[str]
    layers: frozenset[int] | None
    layers_pattern: tuple[EndPattern, ...]
    invocation: tuple[int, ...] = ()
    ties: bool = False

    def targets(self, path: str) -> bool:
        """Whether the module at `path` (such as `model.layers.0.self_attn.q_proj`) is adapted."""
        if self.exclude_modules and _names(self.exclude_modules, path):
            return False
        if isinstance(self.target_modules, ModulePattern):
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
        list_name, found, rest = path.partition("layers.")
        if not found:
            return False
        if self.layers_pattern and not any(p.matches_end(f"{list_name}layers") for p in self.layers_pattern):
            return False
        return int(rest.split(".", 1)[0]) in self.layers


def read_settings(folder: Path, roots: AllowedRoots = ANYWHERE) -> LoraSettings:
    """Read and check `folder`'s adapter_config.json. Raises Flaw."""
    config = _read_config(folder, roots)
    _check_kind(config)
    for field, value in config.items():
        if field in REFUSED and value:
            reason, remedy = REFUSED[field]
            raise Flaw(f"{CONFIG_FILE} sets {field}={short(value)}: {reason}, which is not served; {remedy}")
        if field not in REFUSED and field not in HONOURED and field not in IRRELEVANT and value:
            shown = field if field.isidentifier() and len(field) < 60 else short(field)
            raise Flaw(
                f"{CONFIG_FILE} sets {shown}={short(value)}, a field that this version does not know:"
                " it may change the arithmetic; remove it if it does not"
            )
    targets, layers = _modules_field(config, "target_modules"), _layers_field(config)
    if not targets:
        raise Flaw(f"{CONFIG_FILE} names no target_modules: list the modules that were trained")
    if isinstance(config.get("target_modules"), str) and layers is not None:
        raise Flaw(f"{CONFIG_FILE} has layers_to_transform with target_modules as a regex: use one of them")
    return LoraSettings(
        r=_rank(config.get("r"), "r"),
        alpha=_alpha(config.get("lora_alpha"), "lora_alpha"),
        use_rslora=_flag(config, "use_rslora"),
        rank_pattern=_pattern(config, "rank_pattern", _rank),
        alpha_pattern=_pattern(config, "alpha_pattern", _alpha),
        target_modules=targets,
        exclude_modules=_modules_field(config, "exclude_modules"),
        layers=layers,
        layers_pattern=_layers_pattern(config),
        invocation=invocation_of(config),
        ties=_flag(config, "ensure_weight_tying"),
    )


def invocation_of(config: Mapping[str, object]) -> tuple[int, ...]:
    """Read the tokens that an activated LoRA acts from; none if it is no such adapter. Raises Flaw."""
    value = config.get(INVOCATION_FIELD)
    if value is None:
        return ()
    listed = cast(list[object], value) if isinstance(value, list) else []
    found = tuple(each for each in listed if _is_int(each) and 0 <= each <= _MOST_TOKEN_ID)
    if not 0 < len(listed) == len(found) <= MOST_INVOCATION_TOKENS:
        raise Flaw(
            f"{CONFIG_FILE} has {INVOCATION_FIELD}={short(cast(object, value))}: give a list of 1 to"
            f" {MOST_INVOCATION_TOKENS} token ids, or leave it out for a LoRA that acts on all tokens"
        )
    return found


def _read_config(folder: Path, roots: AllowedRoots) -> dict[str, object]:
    try:
        if not folder.is_dir():
            raise Flaw(f"it is not a folder: give the folder that holds {CONFIG_FILE}")
        return read_json_object(folder / CONFIG_FILE, roots)
    except FileNotFoundError:
        raise Flaw(f"it has no {CONFIG_FILE}: give a folder saved by PEFT's save_pretrained") from None
    except OSError as error:
        raise unreadable("its folder", error) from error


def _check_kind(config: Mapping[str, object]) -> None:
    kind, bias = config.get("peft_type"), config.get("bias", "none")
    init = config.get("init_lora_weights", True)
    if kind != "LORA":
        raise Flaw(f"{CONFIG_FILE} has peft_type={short(kind)}: only 'LORA' is served")
    if bias not in ("none", None):
        raise Flaw(
            f"{CONFIG_FILE} has bias={short(bias)}: the base model's biases are trained too; use bias='none'"
        )
    if init in _HARMLESS_INITS:
        return
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        raise Flaw(
            f"{CONFIG_FILE} has init_lora_weights={short(init)}, which changed the base weights at the start of"
            " the training: convert it with save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    raise Flaw(f"{CONFIG_FILE} has init_lora_weights={short(init)}, which this version does not know")


def _modules_field(config: Mapping[str, object], field: str) -> ModulePattern | frozenset[str]:
    """Read a pattern, or names; no names where the field is unset."""
    value = config.get(field) or list[object]()
    if isinstance(value, str):
        if value.lower() == ALL_LINEAR:
            return frozenset(SITES) if field == "target_modules" else frozenset((value,))
        return compile_pattern(field, value)
    return frozenset(_strings(value, field, "give a list of names or a regex"))


def _layers_field(config: Mapping[str, object]) -> frozenset[int] | None:
    value = config.get("layers_to_transform")
    if value is None or value == []:
        return None
    layers = _list(value)
    found = [layer for layer in layers if _is_int(layer) and 0 <= layer <= _MOST_NUMBER]
    if len(found) < len(layers):
        raise Flaw(f"{CONFIG_FILE} has layers_to_transform={short(value)}: give layer numbers from 0")
    return frozenset(found)


def _layers_pattern(config: Mapping[str, object]) -> tuple[EndPattern, ...]:
    value = config.get("layers_pattern") or list[object]()
    texts = [value] if isinstance(value, str) else _strings(value, "layers_pattern", "give a list of names")
    return tuple(compile_end_pattern("layers_pattern", text) for text in _bounded(texts, "layers_pattern"))


def _pattern(
    config: Mapping[str, object], field: str, read: Callable[[object, str], Number]
) -> tuple[tuple[EndPattern, Number], ...]:
    """Read an object of module patterns and numbers, in its order."""
    value = config.get(field) or dict[str, object]()
    if not isinstance(value, dict):
        raise Flaw(f"{CONFIG_FILE} has {field}={short(value)}: give an object of module names and numbers")
    numbers = cast(dict[str, object], value)
    return tuple(
        (compile_end_pattern(field, text), read(numbers[text], f"{field}[{short(text)}]"))
        for text in _bounded(numbers, field)
    )


def _strings(value: object, field: str, remedy: str) -> list[str]:
    texts = _list(value)
    found = [text for text in texts if isinstance(text, str)]
    if len(found) < len(texts):
        raise Flaw(f"{CONFIG_FILE} has {field}={short(value)}: {remedy}")
    return found


def _list(value: object) -> list[object]:
    return cast(list[object], value) if isinstance(value, list) else [value]


def _bounded(texts: Collection[str], field: str) -> Collection[str]:
    """Refuse more patterns than can be matched in a moment."""
    regexes = sum(len(text) for text in texts if not is_literal(text))
    if len(texts) > _MOST_PATTERNS or regexes > _MOST_REGEX_CHARS:
        raise Flaw(
            f"{CONFIG_FILE} has {len(texts)} patterns in {field}, {regexes} characters of them in regexes; at most"
            f" {_MOST_PATTERNS} and {_MOST_REGEX_CHARS} are matched: use fewer, or names"
        )
    return texts


def _rank(value: object, field: str) -> int:
    if not _is_int(value) or not 1 <= value <= _MOST_NUMBER:
        raise Flaw(
            f"{CONFIG_FILE} has {field}={short(value)}: a rank is a whole number from 1 to {_MOST_NUMBER}"
        )
    return value


def _alpha(value: object, field: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _MOST_ALPHA:
        return float(value)
    raise Flaw(
        f"{CONFIG_FILE} has {field}={short(value)}: give the number that the training used,"
        f" of at most {_MOST_ALPHA:g}"
    )


def _flag(config: Mapping[str, object], field: str) -> bool:
    value = config.get(field) or False
    if not isinstance(value, bool):
        raise Flaw(f"{CONFIG_FILE} has {field}={short(value)}: give true or false")
    return value


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _names(wanted: ModulePattern | frozenset[str], path: str) -> bool:
    """Tell whether a pattern matches the whole path, or a name is the path or its dotted end."""
    if isinstance(wanted, ModulePattern):
        return wanted.matches(path)
    parts = path.split(".")
    return any(".".join(parts[start:]) in wanted for start in range(len(parts)))


def _first_match(pattern: tuple[tuple[EndPattern, Number], ...], path: str, default: Number) -> Number:
    """Return the number of the first key that matches the path or its dotted end."""
    return next((number for key, number in pattern if key.matches_end(path)), default)
