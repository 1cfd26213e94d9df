"""Open files that must lie below certain folders, whoever exchanges files and folders meanwhile.

A path is resolved first, and then walked from the root's own descriptor without following a link. So what is opened
was reached from the root, whatever a link means by now, and nothing outside is opened even to be looked at.
"""

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from errno import ELOOP, ENOTDIR
from pathlib import Path

_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
# Linux lets a folder be walked through which may not be listed.
_FOLDER = os.O_DIRECTORY | os.O_CLOEXEC | (os.O_PATH if sys.platform == "linux" else os.O_RDONLY)


class OutsideRoots(Exception):
    """A path leads outside of the allowed folders, or came to mean something else while it was followed."""


@dataclass(frozen=True, slots=True)
class AllowedRoots:
    """The folders, themselves without links, below which files may lie; None allows them anywhere."""

    paths: tuple[Path, ...] | None = None

    @classmethod
    def below(cls, folders: Iterable[Path]) -> "AllowedRoots":
        """Allow what lies below these folders, where they lead now."""
        return cls(tuple(folder.resolve() for folder in folders))

    def root_of(self, path: Path) -> Path | None:
        """Return the first root that `path`, which has no links, lies below."""
        return next((root for root in self.paths or () if path != root and path.is_relative_to(root)), None)

    def open(self, path: Path) -> int:
        """Open a file for reading, and return its descriptor. Raises OSError, and OutsideRoots before it is opened."""
        if self.paths is None:
            return os.open(path, _FILE)
        found = _resolved(path)
        root = self.root_of(found)
        if root is None:
            raise OutsideRoots(path.name)
        try:
            return _walk(root, found.relative_to(root).parts)
        except OSError as error:
            # There was no link on the way, so one was put there; what a link named may have gone with it.
            if error.errno in (ELOOP, ENOTDIR) or _resolved(path) != found:
                raise OutsideRoots(path.name) from error
            raise


ANYWHERE = AllowedRoots()


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """A PEFT folder, and where its files may lead: below a root if a client named it, anywhere if the operator did.

    `url` is where its files are fetched from, "" for a folder that is this machine's own.
    """

    path: Path
    roots: AllowedRoots = ANYWHERE
    url: str = ""

    @property
    def source(self) -> str:
        """What names the adapter's place: the URL with all that it has, or else the path."""
        return self.url or str(self.path)


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except RuntimeError as error:  # Python's own word for links that lead to themselves
        raise OSError(ELOOP, os.strerror(ELOOP), str(path)) from error


def _walk(root: Path, parts: tuple[str, ...]) -> int:
    """Open the file that `parts` lead to from `root`; a link on the way is an error."""
    at = os.open(root, _FOLDER)
    try:
        for part in parts[:-1]:
            below = os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=at)
            os.close(at)
            at = below
        return os.open(parts[-1], _FILE | os.O_NOFOLLOW, dir_fd=at)
    finally:
        os.close(at)
