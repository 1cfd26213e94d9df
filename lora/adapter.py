"""Name an adapter everywhere, by value. Torch-free, so that decisions may hold it."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

MOST_NAME_CHARS = 128
NAME_RULE = f"at most {MOST_NAME_CHARS} letters, digits or any of ._:@+-, with single slashes inside"
_NAME = re.compile(r"(?!.*(?:^|/)\.+(?:/|$))[A-Za-z0-9._:@+-]+(?:/[A-Za-z0-9._:@+-]+)*")


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """One adapter's identity and size; two refs are equal when their content is, whatever they are called.

    `digest` is the content digest (hex) of the adapter's packed form, and `nbytes` the bytes of that. `rank` is the
    largest rank of any of its modules, `sites` are the module kinds it changes (`q_proj`, ...). `invocation` are the
    tokens that an activated LoRA acts from (see lora.activation); it is empty for one that acts on all tokens.
    """

    digest: str
    name: str = field(compare=False)
    rank: int = field(compare=False)
    sites: tuple[str, ...] = field(compare=False)
    nbytes: int = field(compare=False)
    invocation: tuple[int, ...] = field(default=(), compare=False)

    def __hash__(self) -> int:  # the generated one builds a tuple, and refs are looked up for every token
        return hash(self.digest)

    @property
    def is_base(self) -> bool:
        """True for the base model, which is an adapter of rank 0 and never `None`."""
        return self.rank == 0


BASE = AdapterRef(digest="", name="", rank=0, sites=(), nbytes=0)


@dataclass(frozen=True, slots=True)
class RemoteName:
    """A name that a peer told. It means `ref` here, `hops` away from a node that owns it."""

    ref: AdapterRef
    hops: int


Effect = Literal["some", "none", "unknown"]
"""What an adapter changed of the base's answer to a short prompt; unknown if that could not be computed in time."""


@dataclass(frozen=True, slots=True)
class AdapterEntry:
    """A name that requests may use. `folder` is None where a peer told the name, `ref` until the folder was read.

    `inertia` says why the adapter changes no output, "" if it may, None where that is not known. `refusal` says why
    the folder is not served, if it was read and is not. `effect` is None until the adapter has been tried. `url` is
    what the folder's files were fetched from, "" where it is this machine's own; it may hold secrets.
    """

    name: str
    folder: Path | None
    ref: AdapterRef | None
    inertia: str | None = None
    refusal: str | None = None
    effect: Effect | None = None
    url: str = field(default="", repr=False)

    @property
    def source(self) -> str:
        """What names the adapter's place: the URL, the path, "" where a peer told the name. It may hold secrets."""
        return self.url or ("" if self.folder is None else str(self.folder))


def is_name(text: str) -> bool:
    """Tell whether `text` follows NAME_RULE."""
    return len(text) <= MOST_NAME_CHARS and _NAME.fullmatch(text) is not None
