"""Define what a kind of source does: it opens one file of an adapter, anew or where an earlier download was cut."""

from dataclasses import dataclass
from typing import Protocol

from lora.format.adapter_files import Flaw
from lora.sources.source_url import SourceUrl


class SourceForbidden(Flaw):
    """A file that this server may not read. S3 says so of an absent one to whoever may not list its bucket."""


@dataclass(frozen=True, slots=True)
class HeldFile:
    """What is here of a file already: so many bytes of a `version`, "" where the source told none."""

    version: str = ""
    nbytes: int = 0
    is_whole: bool = False


NOTHING_HELD = HeldFile()


class OpenedFile(Protocol):
    """A file's bytes from `start` on. `size` is the whole file's, None where the source does not tell it."""

    @property
    def start(self) -> int:
        """Where its bytes begin: at what is held, or at 0 if that is of another version or cannot be gone on with."""
        ...

    @property
    def size(self) -> int | None:
        """The whole file's bytes."""
        ...

    @property
    def version(self) -> str:
        """What changes whenever the file does; "" if the source tells nothing of that kind."""
        ...

    def read(self, most: int) -> bytes:
        """Return some bytes, at most so many; none at the end, or where the source broke off. Raises OSError."""
        ...

    def close(self) -> None:
        """Ask for no more."""
        ...


class SourceFiles(Protocol):
    """One kind of source. Its methods wait for the network, each for a bounded time, and are called in threads."""

    def open(self, url: SourceUrl, file: str, held: HeldFile) -> OpenedFile | None:
        """Open a file of the adapter at `url`; None if it is whole here and unchanged there.

        Raises FileNotFoundError; Flaw for what does not pass by itself, OSError or PassingFlaw for what may.
        """
        ...
