"""What an adapter may be called, and what a name means at this node."""

import re
import threading
from dataclasses import dataclass, field
from pathlib import Path

from lora.adapter import AdapterRef

MOST_NAME_CHARS = 128
NAME_RULE = f"at most {MOST_NAME_CHARS} letters, digits or any of ._:@+-, with single slashes inside"
_NAME = re.compile(r"(?!.*(?:^|/)\.+(?:/|$))[A-Za-z0-9._:@+-]+(?:/[A-Za-z0-9._:@+-]+)*")


def is_name(text: str) -> bool:
    """Whether `text` follows NAME_RULE."""
    return len(text) <= MOST_NAME_CHARS and _NAME.fullmatch(text) is not None


@dataclass(slots=True)
class Name:
    """What a name means now; `folder` is None where a peer told it.

    `hops` is how far this node is from one that owns the name (0: it does), `misses` how often in a row no peer stood
    by it. `packing` is held by whoever reads the folder, so that it is read once.
    """

    name: str
    folder: Path | None
    ref: AdapterRef | None = None
    hops: int = 0
    misses: int = 0
    packing: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True, slots=True)
class RemoteName:
    """A name that a peer told, and means `ref` here; see Name."""

    ref: AdapterRef
    hops: int


@dataclass(frozen=True, slots=True)
class AdapterEntry:
    """A name that requests may use. `folder` is None where a peer told the name, `ref` until the folder was read."""

    name: str
    folder: Path | None
    ref: AdapterRef | None
