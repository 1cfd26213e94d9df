"""Read a ServeConfig or a BatchConfig from the command line, a TOML file and the environment.

The options are those that the configurations' fields declare. It may not know what their values do.
"""

import argparse
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from engine.config.access_config import AccessConfig
from engine.config.batches_config import BatchesConfig
from engine.config.cluster_config import ClusterConfig
from engine.config.config import BatchConfig, EngineConfig, ServeConfig
from engine.config.http_config import HttpConfig
from engine.config.launch_config import COMMANDS, FOR_RANGE, FOR_START, LaunchConfig
from engine.config.option import Configuration, Option, options_of, renamed, suggestion
from engine.config.option_types import FLAG, LORA, TEXT, lora_table, separate
from engine.config.peer_config import PEER_TOKEN_VARIABLE, PeerConfig
from engine.config.source_config import SourceConfig
from engine.config.tenants_config import TenantsConfig
from engine.errors import InvalidConfig

SERVE_OPTIONS = tuple(
    option
    for owner in (
        EngineConfig,
        SourceConfig,
        ServeConfig,
        HttpConfig,
        BatchesConfig,
        AccessConfig,
        TenantsConfig,
        PeerConfig,
        ClusterConfig,
        LaunchConfig,
    )
    for option in options_of(owner)
)
BATCH_OPTIONS = (*options_of(BatchConfig), *options_of(EngineConfig), *options_of(SourceConfig))
_BATCH_PURPOSE = (
    "Answer a file of OpenAI batch requests. Run it again to go on where it was stopped. Exit codes: 0 every line "
    "has an answer, 1 the run failed, 2 an option or a file cannot be used, 3 some lines have errors, 130 interrupted."
)
_ANY_LOCAL = "127.0.0.1:0"
_OTHERS: Mapping[str, tuple[str, ...]] = {
    "coordinator": ("nodes", "batch_dir"),
    "node": ("nodes", "registry_file", "batch_dir"),
    "router": ("nodes", "registry_file"),
}
"""What a role does not read of what all roles share."""


@dataclass(frozen=True, slots=True)
class _Raw:
    """Something written, and the folder that its relative paths start from."""

    value: object
    base: Path


def serve_config(arguments: Sequence[str], environ: Mapping[str, str]) -> ServeConfig:
    """Return what `python -m engine.serve` was asked for.

    The command line wins over the environment, and that over the file. Raises InvalidConfig; exits for --help and
    for flags that do not exist.
    """
    given = _given(
        "engine.serve", "Serve a base model and its LoRA adapters.", SERVE_OPTIONS, arguments, environ
    )
    asked = {each.partition("=")[0] for each in arguments}
    if (role := given.get("role")) is not None:
        # They may stand in a file that whoever started this process shares with it.
        others = (
            *_OTHERS.get(str(role.value), ("nodes",)),
            *(option.key for option in options_of(LaunchConfig)),
        )
        for key in others:
            if f"--{key.replace('_', '-')}" not in asked:
                given.pop(key, None)
    if asked & {f"--{command}" for command in COMMANDS}:
        _leave_out_start(given, asked)
    cluster = ClusterConfig(**_fields(ClusterConfig, given))
    launch = LaunchConfig(**_fields(LaunchConfig, given))
    leads_far = launch.launcher == "ray" and cluster.nodes is not None and not launch.commands
    if (cluster.role != "single" or leads_far) and not {"peer", "peer_listen"} & given.keys():
        given["peer_listen"] = _Raw(_ANY_LOCAL, Path())  # members trust each other as peers do
    if "peer_token_file" in given or not {"peer", "peer_listen"} & given.keys():
        given.pop(PEER_TOKEN_VARIABLE, None)  # alone it asks for nothing
    peers = PeerConfig(**_fields(PeerConfig, given))
    sources = SourceConfig(**_fields(SourceConfig, given))
    engine = EngineConfig(**_fields(EngineConfig, given), peers=peers, sources=sources)
    access = AccessConfig(**_fields(AccessConfig, given))
    http = HttpConfig(**_fields(HttpConfig, given))
    batches = BatchesConfig(**_fields(BatchesConfig, given))
    tenants = TenantsConfig(**_fields(TenantsConfig, given))
    return ServeConfig(
        **_fields(ServeConfig, given), engine=engine, access=access, http=http, batches=batches, cluster=cluster,
        launch=launch, tenants=tenants,
    )  # fmt: skip


def _leave_out_start(given: dict[str, _Raw], asked: Collection[str]) -> None:
    """Leave out what a file says of a cluster's start, where something is `asked` of one that runs."""
    scale = given.get("scale")
    of_start = {"nodes", "routers", *FOR_START, *FOR_RANGE}
    if scale is not None:
        of_start.remove("ray_wait_s")
        of_start -= set(FOR_RANGE) if ":" in str(scale.value) else set()
    for key in of_start:
        if f"--{key.replace('_', '-')}" not in asked:
            given.pop(key, None)


def batch_config(arguments: Sequence[str]) -> BatchConfig:
    """Return what `python -m engine.batch` was asked for; see `serve_config`."""
    given = _given("engine.batch", _BATCH_PURPOSE, BATCH_OPTIONS, arguments, {})
    for name in ("input", "output"):
        if name not in given:
            raise InvalidConfig(name, None, f"name a file with -{name[0]}")
    sources = SourceConfig(**_fields(SourceConfig, given))
    engine = EngineConfig(**_fields(EngineConfig, given), sources=sources)
    return BatchConfig(**_fields(BatchConfig, given), engine=engine)


def _given(
    program: str,
    purpose: str,
    options: Sequence[Option],
    arguments: Sequence[str],
    environ: Mapping[str, str],
) -> dict[str, _Raw]:
    """Return what is written anywhere, by the options' keys."""
    formers = {option.former_key: option.key for option in options if option.former}
    line = vars(_parser(program, purpose, options).parse_args(arguments))
    config = line.pop("config", None)
    file = {} if config is None else _from_file(Path(config), options, formers)
    variables = {option.key: environ[option.variable] for option in options if environ.get(option.variable)}
    written = variables | renamed(line, formers, prefix="--")
    return file | {key: _Raw(value, Path()) for key, value in written.items()}


def _fields(owner: type[Configuration], given: Mapping[str, _Raw]) -> dict[str, Any]:
    """Return the values of a configuration's fields. Raises InvalidConfig: the option, its value and the remedy."""
    return {
        option.field: _value(option, given[option.key]) for option in options_of(owner) if option.key in given
    }


def _value(option: Option, raw: _Raw) -> object:
    if not option.many:
        return option.read(raw.value, raw.base)
    written = lora_table(raw.value) if option.type is LORA else raw.value
    if option.type.separated:
        written = separate(written)
    if option.type is TEXT and isinstance(written, str):
        return (option.read(written, raw.base),)
    if not isinstance(written, list):
        raise InvalidConfig(option.key, raw.value, "give a list")
    items: list[object] = written  # pyright: ignore[reportUnknownVariableType]
    return option.type.container(_distinct(option, [option.read(item, raw.base) for item in items]))


def _distinct(option: Option, items: Sequence[object]) -> Sequence[object]:
    """Return the items. Raises InvalidConfig for a name that is given twice."""
    names = [str(item[0]) for item in items if option.type.container is dict and isinstance(item, tuple)]  # pyright: ignore[reportUnknownArgumentType]
    for name in names:
        if names.count(name) > 1:
            raise InvalidConfig(option.key, name, "the name is given twice: drop one")
    return items


class _OptionParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def _parser(program: str, purpose: str, options: Sequence[Option]) -> argparse.ArgumentParser:
    parser = _OptionParser(f"python -m {program}", description=purpose, allow_abbrev=False)
    parser.add_argument(
        "--config", metavar="FILE", default=argparse.SUPPRESS,
        help="TOML file with any of these options, named with underscores; the command line wins",
    )  # fmt: skip
    flagged = [option for option in options if option.has_flag]
    groups = {name: parser.add_argument_group(name) for name in dict.fromkeys(o.group for o in flagged)}
    for option in flagged:
        names = [option.short] * bool(option.short) + [f"--{option.name}"]
        default = "" if option.default in (None, ()) else f" (default: {option.default})"
        groups[option.group].add_argument(
            *names,
            dest=option.key,
            help=f"{option.meaning}{default}",
            default=argparse.SUPPRESS,
            **_shape(option),
        )
        if option.former:
            parser.add_argument(
                f"--{option.former}", dest=option.former_key, help=argparse.SUPPRESS,
                default=argparse.SUPPRESS, **_shape(option),
            )  # fmt: skip
    return parser


def _shape(option: Option) -> dict[str, Any]:
    if option.type is FLAG:
        return {"action": argparse.BooleanOptionalAction}
    several = {"nargs": "+", "action": "extend"} if option.many else {}
    return {"metavar": option.type.metavar} | several


def _from_file(file: Path, options: Sequence[Option], formers: Mapping[str, str]) -> dict[str, _Raw]:
    """Return what the TOML file says, by key."""
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidConfig("config", str(file), f"it cannot be read: {error}") from error
    content = renamed(content, formers)
    known = [option.key for option in options if option.has_flag]
    for key in content:
        if key not in known:
            hint = suggestion(key, known, "--help lists the options")
            raise InvalidConfig("config", str(file), f"it has the unknown key {key!r}: {hint}")
    return {key: _Raw(value, file.absolute().parent) for key, value in content.items()}
