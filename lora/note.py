"""Note: what a node tells of an adapter that it lends, and under which names a transport lends it.

Two things are lent: `name/BASE/NAME`, the note, by which a peer learns what a name means; and `rows/DIGEST`, the
flat form itself. A note is the digest (64 hex digits) and the flat form's header, as text. BASE is the digest of the
base model: an adapter fits the shapes of many models and makes sense over one, so that nodes of different ones have
nothing to tell each other.
"""

import re
from dataclasses import dataclass

from lora.adapter import AdapterRef
from lora.flat import FlatLayout, InvalidHeader, read_header, write_header

MOST_NOTE_BYTES = 1 << 20
_DIGEST = re.compile(r"[0-9a-f]{64}")
_DIGEST_CHARS = 64


@dataclass(frozen=True, slots=True)
class Note:
    """What a name means at a peer. Nothing is proved by it: the rows are checked against digest and layout."""

    ref: AdapterRef
    layout: FlatLayout


def note_name(base: str, name: str) -> str:
    """What the note of adapter `name` of the base model of digest `base` is lent as."""
    return f"name/{base}/{name}"


def rows_name(digest: str) -> str:
    """What the rows of a content are lent as."""
    return f"rows/{digest}"


def write_note(digest: str, layout: FlatLayout) -> bytes:
    """The note's bytes."""
    return (digest + write_header(layout)).encode()


def read_note(name: str, content: bytes) -> Note:
    """The note that a peer gave for `name`. Raises InvalidHeader unless it is one, word for word."""
    try:
        text = content.decode()
        digest, header = text[:_DIGEST_CHARS], text[_DIGEST_CHARS:]
        layout = read_header(header)
        sound = _DIGEST.fullmatch(digest) and _fits_its_base(layout) and write_header(layout) == header
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise InvalidHeader(f"the note on {name!r} is damaged ({error!r}): ask another peer") from error
    if not sound:
        raise InvalidHeader(f"the note on {name!r} describes no flat form: ask another peer")
    return Note(AdapterRef(digest, name, layout.rank, layout.sites, layout.nbytes), layout)


def _fits_its_base(layout: FlatLayout) -> bool:
    """Whether every module can be one of this base, and is there once."""
    places = {module.order for module in layout.modules}
    return len(places) == len(layout.modules) > 0 and all(
        isinstance(module.rank, int) and module.rank > 0 and 0 <= module.layer < layout.base.num_layers
        for module in layout.modules
    )
