"""Say of a configuration's field how an operator gives it, and check its value.

The annotation of a field holds its Option: the flag, the TOML key, the environment variable, the help and the type all
come from it. So there is one table of options: the fields themselves.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol, TypeVar, get_args, get_origin, get_type_hints

from engine.config.option_types import TEXT, WRITTEN, OptionType
from engine.errors import InvalidConfig, UnknownOption
from lora.sources.source_url import is_url, shown_source
from transport.base import Address

T = TypeVar("T")
C = TypeVar("C", bound="Configuration")
_log = logging.getLogger(__name__)


class Configuration(Protocol):
    """A dataclass whose fields' annotations hold Options."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


@dataclass(frozen=True, slots=True)
class Option:
    """`--name` on the command line, `name` with underscores in a file, `field` of a configuration.

    One that is `many` may be given several times. A `former` name is accepted for one release, with a warning. One
    without a flag is read from its environment `variable` alone.
    """

    group: str
    type: OptionType
    help: str
    name: str = ""
    many: bool = False
    short: str = ""
    note: str = ""
    former: str = ""
    variable: str = ""
    has_flag: bool = True
    field: str = ""
    default: object = None

    @property
    def key(self) -> str:
        """Return its name in a file and in an error."""
        return self.name.replace("-", "_") if self.has_flag else self.variable

    @property
    def former_key(self) -> str:
        """Return the former name in a file."""
        return self.former.replace("-", "_")

    @property
    def meaning(self) -> str:
        """Return the help with the words that may be given and the note."""
        *most, last = self.type.words or ("",)
        words = f": {', '.join(most)} or {last}" if most else ""
        note = f"; {self.note}" if self.note else ""
        return f"{self.help}{words}{note}{' (repeatable)' if self.many else ''}"

    def check(self, value: object) -> None:
        """Raise InvalidConfig, with the remedy, unless the field may have this value."""
        for item in self._items(value):
            self.check_item(item)

    def check_item(self, item: object) -> None:
        """Raise InvalidConfig unless the value is accepted: of several, one."""
        try:
            self.type.check(item)
        except ValueError as error:
            raise InvalidConfig(self.key, self.shown(item), str(error)) from None

    def read(self, written: object, base: Path) -> object:
        """Return the value that a text, or a value of a TOML file, stands for: of several, one.

        Relative paths are relative to `base`. Raises InvalidConfig with the remedy.
        """
        try:
            value = self.type.parse(written, base) if isinstance(written, str) else written
        except ValueError as error:
            raise InvalidConfig(self.key, self.shown(written), str(error)) from None
        self.check_item(value)
        return value

    def shown(self, item: object) -> object:
        """Return what an error may show of a value."""
        if self.type.secret:
            return "(hidden)"
        match item:
            case (str(name), str() | Path() as folder):
                told = shown_source(folder) if isinstance(folder, str) and is_url(folder) else folder
                return f"{name}={told}"
            case Path() | Address():
                return str(item)
            case _:
                return item

    def _items(self, value: object) -> Iterable[object]:
        if not self.many:
            return (value,)
        if self.type.container is dict and isinstance(value, Mapping):
            return tuple(value.items())  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
        if self.type.container is tuple and isinstance(value, tuple):
            return value  # pyright: ignore[reportUnknownVariableType]
        if self.type is TEXT and isinstance(value, str):
            return (value,)
        raise InvalidConfig(self.key, self.shown(value), f"give a {self.type.container.__name__}")


@cache
def options_of(owner: type[Configuration]) -> tuple[Option, ...]:
    """Return the options of a configuration's own fields, in their order."""
    hints = get_type_hints(owner, include_extras=True)
    return tuple(
        replace(
            option,
            field=field.name,
            name=option.name or field.name.replace("_", "-"),
            default=None if field.default is MISSING else field.default,
        )
        for field in fields(owner)
        if get_origin(hints[field.name]) is Annotated
        for option in get_args(hints[field.name])[1:]
        if isinstance(option, Option)
    )


def check_fields(config: Configuration) -> None:
    """Raise InvalidConfig if a field's value is not accepted. None stands for a default that is None."""
    for option in options_of(type(config)):
        value: object = getattr(config, option.field)
        if value is not None or option.default is not None:
            option.check(value)


def suggestion(key: str, known: Iterable[str], otherwise: str) -> str:
    """Return the question whether a known name that is much like `key` was meant, or else `otherwise`."""
    near = get_close_matches(key, list(known), n=1)
    return f"did you mean {near[0]}?" if near else otherwise


def renamed(given: Mapping[str, T], names: Mapping[str, str], prefix: str = "") -> dict[str, T]:
    """Return `given` with former names, the keys of `names`, replaced by the present ones; each use is warned of.

    Raises InvalidConfig if something is given by both names.
    """
    for former in given.keys() & names.keys():
        if names[former] in given:
            raise InvalidConfig(
                former, given[former], f"{names[former]} is its new name and given too: drop one"
            )
    for former in sorted(given.keys() & names.keys()):
        spelled = [
            f"{prefix}{name.replace('_', '-') if prefix else name}" for name in (former, names[former])
        ]
        _log.warning("%s is now called %s; the next release knows the new name only", *spelled)
    return {names.get(key, key): value for key, value in given.items()}


def from_python(owner: type[C], arguments: Sequence[Any], keywords: Mapping[str, Any]) -> C:
    """Return a configuration from the arguments of a constructor, with former names accepted.

    A size, a path or an address may be a text. Raises UnknownOption for a keyword that names no field.
    """
    options = options_of(owner)
    formers = {option.former_key: option.field for option in options if option.former}
    known = [field.name for field in fields(owner)]
    given = renamed(keywords, formers)
    for name, value in given.items():
        if name not in known:
            remedy = f"there is no such option: {suggestion(name, known, 'docs/options.md lists them')}"
            raise UnknownOption(name, value, remedy)
    for option in options:
        written = given.get(option.field)
        if isinstance(written, str) and option.type in WRITTEN and not option.many:
            given[option.field] = option.read(written, Path())
    return owner(*arguments, **given)
