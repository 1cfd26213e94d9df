"""Define one input to try, and what a target does with it. Cases are files, so that each can be tried again."""

import random
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Case:
    """One input: `head` says which door or file it is for, in one line, and `content` is what comes there."""

    head: str
    content: bytes

    def encoded(self) -> bytes:
        """Return the case as a file's content."""
        return self.head.encode() + b"\n" + self.content

    @classmethod
    def decoded(cls, file: bytes) -> "Case":
        """Read a case from a file's content."""
        head, _, content = file.partition(b"\n")
        return cls(head.decode(), content)


class Finding(Exception):
    """Something came of a case that never may: the message says what."""


class Target(Protocol):
    """One reader of strangers' inputs."""

    def whole(self) -> list[Case]:
        """Return inputs that are taken, at least one of each head."""
        ...

    def draw(self, chance: random.Random) -> Case:
        """Draw a spoilt input."""
        ...

    def run(self, case: Case) -> str:
        """Try the case and return in a word what came of it. Raises Finding, or whatever escapes the reader."""
        ...

    def check(self) -> None:
        """Raise Finding if the cases so far have left something behind."""
        ...

    def close(self) -> None:
        """End what the target started."""
        ...
