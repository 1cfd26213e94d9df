"""Files that the planner's options name: refused with the option, the value and the remedy."""

import csv
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from scheduler.cluster.cost.profile import InvalidProfile
from scheduler.sim.workload.adapters import InvalidCatalogue
from scheduler.sim.workload.trace import InvalidTrace

_T = TypeVar("_T")


class InvalidOption(ValueError):
    """An option whose value cannot be used; says which and the remedy."""


def read(option: str, path: Path, remedy: str, parse: Callable[[str], _T]) -> _T:
    """Return what `parse` makes of the text of the file that `option` names.

    Raises InvalidOption if the file cannot be read or `parse` refuses it; `remedy` says what is to be given.
    """
    try:
        return parse(path.read_text())
    except OSError as error:
        raise InvalidOption(f"{option} {path}: {error.strerror}: {remedy}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InvalidOption(f"{option} {path}: this is not such a text file: {remedy}") from error
    except (InvalidCatalogue, InvalidProfile, InvalidTrace) as error:
        raise InvalidOption(f"{option} {path}: {error}") from error


def check_writable(option: str, path: Path) -> None:
    """Raises InvalidOption if no file can be written at `path`; writes nothing."""
    if path.is_dir():
        raise InvalidOption(f"{option} {path}: this is a folder: give a file's name in it")
    if not path.parent.is_dir():
        raise InvalidOption(
            f"{option} {path}: there is no folder {path.parent}: make it, or give another path"
        )
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InvalidOption(f"{option} {path}: may not be written: give another path")


def write(option: str, path: Path, make: Callable[[Path], object]) -> None:
    """Let `make` write the file that `option` names. Raises InvalidOption if it cannot."""
    try:
        make(path)
    except OSError as error:
        raise InvalidOption(f"{option} {path}: {error.strerror}: give another path") from error
