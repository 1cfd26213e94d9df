"""Manifest: what a node tells of an adapter that it lends, and under which names a transport lends it.

Two things are lent: `name/BASE/NAME`, the note, by which a peer learns what a name means; and `rows/DIGEST`, the
flat form itself. A note is the digest (64 hex digits), how many hops the teller is from a node that owns the name, and
the flat form's header, as text. BASE is the digest of the base model: an adapter fits the shapes of many models and
makes sense over one, so that nodes of different ones have nothing to tell each other.
"""

import re
from dataclasses import dataclass, replace

from lora.adapter import AdapterRef
from lora.format.packed import InvalidHeader, PackedLayout, read_header, write_header

MOST_NOTE_BYTES = 1 << 20
MOST_HOPS = 4
"""A name learnt this far from its owner is told to nobody: no hearsay outlives its source by going in circles."""
_TEXT = re.compile(rf"(?P<digest>[0-9a-f]{{64}}) (?P<hops>[0-{MOST_HOPS}]) (?P<header>.*)", re.DOTALL)
_NAME_PREFIX, _ROWS_PREFIX = "name/", "rows/"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a name means at a node, `hops` from one that owns it: 0 where it was loaded from a folder.

    Nothing is proved by it: the rows are checked against digest and layout.
    """

    ref: AdapterRef
    layout: PackedLayout
    hops: int = 0

    def passed_on(self) -> "Manifest":
        """The note as the node has it that was told."""
        return replace(self, hops=self.hops + 1)


def manifest_name(base: str, name: str) -> str:
    """What the note of adapter `name` of the base model of digest `base` is lent as."""
    return f"{_NAME_PREFIX}{base}/{name}"


def weights_name(digest: str) -> str:
    """What the rows of a content are lent as."""
    return f"{_ROWS_PREFIX}{digest}"


def name_in_manifest(base: str, lent: str) -> str | None:
    """The adapter whose note is lent as `lent`; None if that is something else."""
    prefix = manifest_name(base, "")
    return lent.removeprefix(prefix) if lent.startswith(prefix) else None


def published_digest(lent: str) -> str | None:
    """The content whose rows are lent as `lent`; None if that is something else."""
    return lent.removeprefix(_ROWS_PREFIX) if lent.startswith(_ROWS_PREFIX) else None


def write_manifest(note: Manifest) -> bytes:
    """The note's bytes."""
    return f"{note.ref.digest} {note.hops} {write_header(note.layout)}".encode()


def read_manifest(name: str, content: bytes) -> Manifest:
    """The note that a peer gave for `name`. Raises InvalidHeader unless it is one, word for word."""
    try:
        parts = _TEXT.fullmatch(content.decode())
        if parts is None:
            raise InvalidHeader("no digest, hops and header")
        layout = read_header(parts["header"])
        sound = _fits_its_base(layout) and write_header(layout) == parts["header"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise InvalidHeader(f"the note on {name!r} is damaged ({error!r}): ask another peer") from error
    if not sound:
        raise InvalidHeader(f"the note on {name!r} describes no flat form: ask another peer")
    ref = AdapterRef(parts["digest"], name, layout.rank, layout.sites, layout.nbytes)
    return Manifest(ref, layout, int(parts["hops"]))


def _fits_its_base(layout: PackedLayout) -> bool:
    """Whether every module can be one of this base, and is there once."""
    places = {module.order for module in layout.modules}
    return len(places) == len(layout.modules) > 0 and all(
        isinstance(module.rank, int) and module.rank > 0 and 0 <= module.layer < layout.base.num_layers
        for module in layout.modules
    )
