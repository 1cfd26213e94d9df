"""Tell what a node publishes of an adapter, and under which names a transport publishes it.

Three things are published. `name/BASE/NAME` is the manifest, by which a peer learns what a name means.
`layout/BASE/DIGEST` is the same for a content that is known by its digest. `rows/DIGEST` is the packed form itself. A
manifest is text: the digest (64 hex digits), the hops from the teller to a node that owns the name, and the packed
form's header. A second line has the adapter's companions, if there are any. BASE is the digest of the base model. An
adapter fits the shapes of many models and makes sense over one, so that nodes of different ones have nothing to tell
each other.
"""

import re
from dataclasses import dataclass, replace

from lora.adapter import AdapterRef
from lora.format.companions import NO_COMPANIONS, Companions, parse_companions, write_companions
from lora.format.packed import InvalidHeader, PackedLayout, read_header, write_header
from lora.target_modules import OUTER_SITES

MOST_MANIFEST_BYTES = 1 << 20
MOST_HOPS = 4
"""A name learnt this far from its owner is told to nobody: it does not outlive its owner by going in circles."""
_TEXT = re.compile(
    rf"(?P<digest>[0-9a-f]{{64}}) (?P<hops>[0-{MOST_HOPS}]) (?P<header>[^\n]*)(?:\n(?P<companions>.+))?"
)
_NAME_PREFIX, _LAYOUT_PREFIX, _ROWS_PREFIX = "name/", "layout/", "rows/"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a name means at a node, `hops` from one that owns it: 0 where it was loaded from a folder.

    Nothing is proved by it: the rows are checked against digest and layout.
    """

    ref: AdapterRef
    layout: PackedLayout
    hops: int = 0
    companions: Companions = NO_COMPANIONS

    def one_hop_farther(self) -> "Manifest":
        """Return the manifest as it is at the node that was told."""
        return replace(self, hops=self.hops + 1)


def manifest_name(base: str, name: str) -> str:
    """Return what the manifest of adapter `name` is published as, over the base model of digest `base`."""
    return f"{_NAME_PREFIX}{base}/{name}"


def layout_name(base: str, digest: str) -> str:
    """Return what the manifest of a content is published as, over the base model of digest `base`."""
    return f"{_LAYOUT_PREFIX}{base}/{digest}"


def digest_in_layout(base: str, published: str) -> str | None:
    """Return the content whose manifest is published as `published`; None if that is something else."""
    prefix = layout_name(base, "")
    return published.removeprefix(prefix) if published.startswith(prefix) else None


def weights_name(digest: str) -> str:
    """Return what the rows of a content are published as."""
    return f"{_ROWS_PREFIX}{digest}"


def name_in_manifest(base: str, published: str) -> str | None:
    """Return the adapter whose manifest is published as `published`; None if that is something else."""
    prefix = manifest_name(base, "")
    return published.removeprefix(prefix) if published.startswith(prefix) else None


def published_digest(published: str) -> str | None:
    """Return the content whose rows are published as `published`; None if that is something else."""
    return published.removeprefix(_ROWS_PREFIX) if published.startswith(_ROWS_PREFIX) else None


def write_manifest(manifest: Manifest) -> bytes:
    """Write a manifest as text."""
    lines = [f"{manifest.ref.digest} {manifest.hops} {write_header(manifest.layout)}"]
    if companions := write_companions(manifest.companions):
        lines.append(companions)
    return "\n".join(lines).encode()


def read_manifest(name: str, content: bytes) -> Manifest:
    """Read the manifest that a peer gave for `name`. Raises InvalidHeader unless it is one, word for word."""
    try:
        parts = _TEXT.fullmatch(content.decode())
        if parts is None:
            raise InvalidHeader("no digest, hops and header")
        layout = read_header(parts["header"])
        companions = parse_companions(parts["companions"] or "")
        sound = _fits_its_base(layout) and write_header(layout) == parts["header"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise InvalidHeader(f"the manifest of {name!r} is damaged ({error!r}): ask another peer") from error
    if not sound:
        raise InvalidHeader(f"the manifest of {name!r} describes no packed form: ask another peer")
    return Manifest(layout.ref(parts["digest"], name), layout, int(parts["hops"]), companions)


def _fits_its_base(layout: PackedLayout) -> bool:
    """Tell whether every module can be one of this base, and is there once."""
    places = {module.order for module in layout.modules}
    return len(places) == len(layout.modules) > 0 and all(
        type(module.rank) is int
        and module.rank > 0
        and 0 <= module.layer < (1 if module.site in OUTER_SITES else layout.base.num_layers)
        for module in layout.modules
    )
