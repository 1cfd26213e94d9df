"""Options: the command line, a TOML file and the environment become a ServeConfig or a BatchConfig.

One table says everything there is to say of an option; the parser, the file's keys and the help come from it.
It may not know what the values do.
"""

import argparse
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from engine.config.config import PEER_TOKEN_VARIABLE, BatchConfig, EngineConfig, PeerConfig, ServeConfig
from engine.config.option_types import (
    Reader,
    address,
    choice,
    count,
    few,
    flag,
    folder,
    lora,
    model,
    path,
    port,
    seconds,
    secret,
    secret_file,
    size,
    text,
)
from engine.config.trust import trust
from engine.errors import InvalidConfig

API_KEY_VARIABLE = "LORASERVE_API_KEY"


@dataclass(frozen=True, slots=True)
class Option:
    """`--name` on the command line, `name` (with underscores) in a file, `field` of the configuration."""

    group: str
    name: str
    read: Reader
    metavar: str
    help: str
    field: str = ""
    many: bool = False
    short: str = ""

    @property
    def key(self) -> str:
        """Its name in a file."""
        return self.name.replace("-", "_")

    @property
    def target(self) -> str:
        """The configuration's field."""
        return self.field or self.key


_ENGINE = (
    Option("model", "model", model, "DIR|ID", "folder or hub id of the base model; none: the embedded demo"),
    Option("model", "served-model-name", text, "NAME", "what requests call the base model"),
    Option("model", "dtype", choice("auto", "float32", "bfloat16"), "TYPE", "auto, float32 or bfloat16"),
    Option("model", "device", choice("auto", "cpu", "cuda"), "DEVICE", "auto, cpu or cuda"),
    Option("model", "tensor-parallel-size", count, "N", "devices that compute each layer together"),
    Option("model", "quantization", choice("none", "int8", "fp8"), "FORM", "none, int8 (CPU) or fp8 (CUDA)"),
    Option(
        "model",
        "attention-backend",
        choice("auto", "torch", "triton", "flashinfer"),
        "NAME",
        "auto, torch, triton or flashinfer; auto: torch on a CPU, else flashinfer where installed, else triton",
    ),
    Option("model", "cuda-graphs", flag, "", "record decode steps on a CUDA device, and replay them"),
    Option("model", "max-model-len", count, "N", "most tokens of a prompt and its answer together"),
    Option("model", "progress", flag, "", "show progress while the model is read"),
    Option(
        "adapters", "lora", lora, "NAME=DIR", "load this PEFT folder at start (repeatable)", "loras", True
    ),
    Option("adapters", "lora-dir", folder, "DIR", "every PEFT folder below is known by its name"),
    Option(
        "adapters",
        "lora-dtype",
        choice("auto", "float32", "bfloat16", "fp8"),
        "TYPE",
        "auto, float32 (twice the memory, on a CPU the faster), bfloat16 or fp8 (half its memory)",
    ),
    Option("adapters", "adapter-bytes", size, "SIZE", "memory for resident adapters"),
    Option(
        "adapters",
        "shared-memory",
        choice("auto", "on", "off"),
        "WHEN",
        "whether adapters and keys and values lend each other memory; auto: on a CUDA device",
    ),
    Option("adapters", "adapter-cache-dir", path, "DIR", "keep packed adapters on disk here"),
    Option(
        "adapters", "adapter-patience-s", seconds, "S", "how long a request may be passed over for others"
    ),
    Option("scheduling", "max-num-seqs", count, "N", "sequences that run at once"),
    Option("scheduling", "max-num-batched-tokens", count, "N", "tokens per step"),
    Option("scheduling", "kv-cache-bytes", size, "SIZE", "memory for keys and values (2GiB, 512MiB, ...)"),
    Option("scheduling", "block-size", count, "N", "tokens per block of keys and values"),
)

_SERVER = (
    Option("server", "host", text, "ADDRESS", "where to listen"),
    Option("server", "port", port, "PORT", "0 picks a free one"),
    Option("server", "api-key", secret, "KEY", f"what clients must send; better set {API_KEY_VARIABLE}"),
    Option("server", "log-level", choice("debug", "info", "warning"), "LEVEL", "debug, info or warning"),
    Option("server", "max-waiting", count, "N", "requests that may queue before 429"),
    Option("server", "drain-s", seconds, "S", "time to finish what runs when told to stop"),
    Option(
        "server", "lora-root", folder, "DIR", "adapters may be loaded by path from below here (repeatable)",
        "lora_roots", True,
    ),
)  # fmt: skip

_PEERS = (
    Option(
        "peers", "peer", address, "HOST:PORT", "pull adapters that this node lacks from here (repeatable)",
        "peers", True,
    ),
    Option("peers", "peer-listen", address, "HOST:PORT", "let peers pull this node's adapters here", "listen"),
    Option(
        "peers", "peer-token-file", secret_file, "FILE",
        f"what holds the token that all peers share; or set {PEER_TOKEN_VARIABLE}", "token",
    ),
    Option("peers", "peer-plain", flag, "", "no encryption: peers on this machine only", "plain"),
    Option("peers", "peer-tls-ca", path, "FILE", "PEM: who signs the peers' certificates", "tls_authority"),
    Option("peers", "peer-tls-cert", path, "FILE", "PEM: this node's certificate", "tls_cert"),
    Option("peers", "peer-tls-key", path, "FILE", "PEM: its key", "tls_key"),
    Option("peers", "peer-tls-name", text, "NAME", "what peers' certificates must say; none: their host", "tls_name"),
    Option("peers", "peer-door", choice("auto", "ucx", "stream"), "DOOR", "auto, ucx or stream", "door"),
    Option(
        "peers", "peer-bandwidth", size, "SIZE", "bytes per second to pull per peer, on average",
        "bandwidth_bytes_per_s",
    ),
    Option("peers", "peer-pulls", few, "N", "pulls at once per peer, 1 to 4", "pulls"),
    Option("peers", "peer-lend-bytes", size, "SIZE", "memory for lending what is not resident", "lend_bytes"),
    Option("peers", "peer-review-s", seconds, "S", "how often peers' names are asked for again", "review_s"),
)  # fmt: skip

_BATCH = (
    Option("batch", "input", path, "FILE", "requests, one JSON object a line", short="-i"),
    Option(
        "batch", "output", path, "FILE", "results; lines that it already holds are not redone", short="-o"
    ),
    Option("batch", "in-flight", count, "N", "lines that run at once"),
)


@dataclass(frozen=True, slots=True)
class _Raw:
    """Something written, and the folder that its relative paths start from."""

    value: object
    base: Path


def serve_config(arguments: Sequence[str], environ: Mapping[str, str]) -> ServeConfig:
    """What `python -m engine.serve` was asked for: the command line wins over the environment, and that over
    the file. Raises InvalidConfig; exits for --help and for flags that do not exist."""
    options = (*_ENGINE, *_SERVER, *_PEERS)
    written, file = _written("engine.serve", "Serve a base model and its LoRA adapters.", options, arguments)
    variable = {"api_key": environ[API_KEY_VARIABLE]} if environ.get(API_KEY_VARIABLE) else {}
    given = file | _here(variable) | _here(written)
    values = _values(options, given)
    sharing = _sharing(given, _taken(_PEERS, values), environ)
    engine = EngineConfig(**_taken(_ENGINE, values), sharing=sharing)
    return ServeConfig(engine=engine, **values)


def batch_config(arguments: Sequence[str]) -> BatchConfig:
    """What `python -m engine.batch` was asked for; see `serve_config`."""
    options = (*_BATCH, *_ENGINE)
    written, file = _written("engine.batch", "Answer a file of OpenAI batch requests.", options, arguments)
    values = _values(options, file | _here(written))
    for name in ("input", "output"):
        if name not in values:
            raise InvalidConfig(name, None, f"name a file with -{name[0]}")
    engine = EngineConfig(**_taken(_ENGINE, values))
    return BatchConfig(engine=engine, **values)


def _sharing(given: Mapping[str, _Raw], values: dict[str, Any], environ: Mapping[str, str]) -> PeerConfig:
    """What was asked for of peers. Raises InvalidConfig if they could not be trusted, or if there are none that it
    could be meant for: a token in the environment alone asks for nothing."""
    token = given.get("peer_token_file")
    origin = None if token is None else path(token.value, token.base)
    known: dict[str, Any] = {"token": environ.get(PEER_TOKEN_VARIABLE), "token_file": origin}
    sharing = PeerConfig(**known | values)
    if sharing.on:
        trust(sharing)
        return sharing
    defaults = PeerConfig()
    for option in _PEERS:
        if option.target in values and values[option.target] != getattr(defaults, option.target):
            remedy = "it does nothing without peers: give --peer or --peer-listen too, or leave it out"
            raise InvalidConfig(option.key, given[option.key].value, remedy)
    return sharing


def _taken(options: Sequence[Option], values: dict[str, Any]) -> dict[str, Any]:
    """The values of `options`, moved out of `values`."""
    return {option.target: values.pop(option.target) for option in options if option.target in values}


def _here(written: Mapping[str, object]) -> dict[str, _Raw]:
    return {key: _Raw(value, Path()) for key, value in written.items()}


def _written(
    program: str, purpose: str, options: Sequence[Option], arguments: Sequence[str]
) -> tuple[dict[str, object], dict[str, _Raw]]:
    """What stands on the command line, and what in the file that it names, by key."""
    written = vars(_parser(program, purpose, options).parse_args(arguments))
    config = written.pop("config", None)
    return written, {} if config is None else _from_file(Path(config), options)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def _parser(program: str, purpose: str, options: Sequence[Option]) -> argparse.ArgumentParser:
    parser = _Parser(f"python -m {program}", description=purpose, allow_abbrev=False)
    parser.add_argument(
        "--config", metavar="FILE", default=argparse.SUPPRESS,
        help="TOML file with any of these options, named with underscores; the command line wins",
    )  # fmt: skip
    defaults = _defaults()
    groups = {name: parser.add_argument_group(name) for name in dict.fromkeys(o.group for o in options)}
    for option in options:
        names = [option.short] * bool(option.short) + [f"--{option.name}"]
        default = defaults.get(option.target)
        told = option.help if default in (None, ()) else f"{option.help} (default: {default})"
        if option.read is flag:
            shape: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        else:
            shape = {"metavar": option.metavar, "action": "append" if option.many else "store"}
        groups[option.group].add_argument(
            *names, dest=option.key, help=told, default=argparse.SUPPRESS, **shape
        )  # fmt: skip
    return parser


def _defaults() -> dict[str, object]:
    kinds = (EngineConfig, ServeConfig, PeerConfig, BatchConfig)
    return {
        field.name: field.default for kind in kinds for field in fields(kind) if field.default is not MISSING
    }


def _from_file(file: Path, options: Sequence[Option]) -> dict[str, _Raw]:
    """What the TOML file says, by key."""
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidConfig("config", str(file), f"it cannot be read: {error}") from error
    known = [option.key for option in options]
    for key in content:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "--help lists the options"
            raise InvalidConfig("config", str(file), f"it has the unknown key {key!r}: {hint}")
    if isinstance(table := content.get("lora"), dict):
        content["lora"] = [f"{name}={where}" for name, where in table.items()]
    return {key: _Raw(value, file.absolute().parent) for key, value in content.items()}


def _values(options: Sequence[Option], written: Mapping[str, _Raw]) -> dict[str, Any]:
    """The configuration's fields, read. Raises InvalidConfig that names the option, its value and the remedy."""
    values: dict[str, Any] = {}
    for option in options:
        if (raw := written.get(option.key)) is None:
            continue
        if not option.many:
            values[option.target] = _read(option, raw.value, raw.base)
        elif isinstance(raw.value, list):
            values[option.target] = tuple(_read(option, item, raw.base) for item in raw.value)
        else:
            raise InvalidConfig(option.key, raw.value, "give a list")
    return values


def _read(option: Option, value: object, base: Path) -> Any:
    try:
        return option.read(value, base)
    except ValueError as error:
        shown = "(hidden)" if option.read is secret else value
        raise InvalidConfig(option.key, shown, str(error)) from None
