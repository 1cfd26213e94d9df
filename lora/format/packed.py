"""Lay an adapter out in its packed form: one buffer of bytes.

It is the same on disk, in host memory, on the wire and on the device: a load, a pull and an eviction are plain copies.

The buffer goes layer by layer and group by group, in the order of the forward pass; what lies outside the layers
follows the first one. A group has its present sites' A matrices, stacked to one [R, in] matrix, then each site's B
transposed, [r, out]. Every module has its own rank and an absent one takes no bytes; every matrix starts on a multiple
of ALIGNMENT. A small header names what the offsets follow from. No file and no residency is known here.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from blake3 import blake3
from torch import Tensor

from lora.activation import MOST_INVOCATION_TOKENS
from lora.adapter import AdapterRef
from lora.segments import AdapterWeights, GroupWeights, SitePart
from lora.target_modules import OUTER_SITES, SITES, BaseShape, SiteGroup, SiteShape

ALIGNMENT = 64  # bytes: a cache line, and the widest vector load
FORMAT = "loraserve-flat-1"
"""With a new number for every change of the layout rules, since offsets follow from them."""

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3fn": torch.float8_e4m3fn,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ORDER = {site: number for number, site in enumerate((*SITES, *OUTER_SITES))}
_GROUP_OF = {site: group for group in SiteGroup for site in group.sites}


class InvalidHeader(ValueError):
    """A header that does not describe a packed form of this version."""


@dataclass(frozen=True, slots=True)
class Module:
    """One adapted projection: y += scale * B (A x), with A [rank, in] and B [out, rank] as they are stored.

    In a dtype of a byte A and B are stored as multiples of their own steps, whose product is in `scale`.
    """

    layer: int
    site: str
    rank: int
    scale: float

    @property
    def order(self) -> tuple[int, int]:
        """Where the module stands in the packed form: by layer, then by site, those outside the layers last."""
        return self.layer, _ORDER[self.site]


@dataclass(frozen=True, slots=True)
class PackedGroup:
    """Where one (layer, group) lies, in elements: its stacked A at `a_start`, `modules[i]`'s Bt at `bt_starts[i]`."""

    layer: int
    group: SiteGroup
    modules: tuple[Module, ...]
    a_start: int
    bt_starts: tuple[int, ...]

    @property
    def rank(self) -> int:
        """Rows of the stacked A."""
        return sum(module.rank for module in self.modules)


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Which modules an adapter has and where each lies; make one with `packed_layout`.

    `base` has its outer sites up to the last one that the adapter has. `invocation` are the tokens that an activated
    LoRA acts from, empty for another.
    """

    base: BaseShape
    dtype: torch.dtype
    places: tuple[PackedGroup, ...]
    nbytes: int
    invocation: tuple[int, ...] = ()

    @property
    def modules(self) -> tuple[Module, ...]:
        """All modules, in the order of the packed form."""
        return tuple(module for place in self.places for module in place.modules)

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max(module.rank for module in self.modules)

    @property
    def sites(self) -> tuple[str, ...]:
        """The module kinds that the adapter changes, in the order of the packed form."""
        present = {module.site for module in self.modules}
        return tuple(site for site in _ORDER if site in present)

    def fits(self, base: BaseShape) -> bool:
        """Return whether it is laid out for this base."""
        return self.base == replace(base, outer=base.outer[: len(self.base.outer)])

    def ref(self, digest: str, name: str) -> AdapterRef:
        """Return the identity of a content that is laid out so."""
        return AdapterRef(digest, name, self.rank, self.sites, self.nbytes, self.invocation)


def packed_layout(
    base: BaseShape, dtype: torch.dtype, modules: Iterable[Module], invocation: tuple[int, ...] = ()
) -> PackedLayout:
    """Place `modules` (distinct, fitting `base`, ranks above 0) in the packed form."""
    step = ALIGNMENT // dtype.itemsize
    places: list[PackedGroup] = []
    end = 0
    ordered = sorted(modules, key=lambda module: module.order)
    sites = {module.site for module in ordered}
    needed = max((number for number, site in enumerate(OUTER_SITES, start=1) if site in sites), default=0)
    base = replace(base, outer=base.outer[:needed])  # so that the content's identity depends on no others
    for (layer, group), members in groupby(
        ordered, key=lambda module: (module.layer, _GROUP_OF[module.site])
    ):
        part = tuple(members)
        a_start, bt_starts = end, list[int]()
        end += _round_up(sum(m.rank for m in part) * base.of(part[0].site).in_features, step)
        for module in part:
            bt_starts.append(end)
            end += _round_up(module.rank * base.of(module.site).out_features, step)
        places.append(PackedGroup(layer, group, part, a_start, tuple(bt_starts)))
    return PackedLayout(base, dtype, tuple(places), end * dtype.itemsize, invocation)


def write_header(layout: PackedLayout) -> str:
    """Write the layout as JSON; equal layouts give equal text. Few have outer sites, or an invocation."""
    header: dict[str, object] = {
        "format": FORMAT,
        "dtype": _DTYPE_NAMES[layout.dtype],
        "num_layers": layout.base.num_layers,
        "shapes": [[shape.in_features, shape.out_features] for shape in layout.base.shapes],
        "modules": [[m.layer, m.site, m.rank, m.scale] for m in layout.modules],
    }
    if layout.base.outer:
        header["outer"] = [[shape.in_features, shape.out_features] for shape in layout.base.outer]
    if layout.invocation:
        header["invocation"] = list(layout.invocation)
    return json.dumps(header, separators=(",", ":"))


def read_header(text: str) -> PackedLayout:
    """Read the layout that `write_header` wrote. Raises InvalidHeader."""
    try:
        header = json.loads(text)
        if header["format"] != FORMAT:
            raise InvalidHeader(f"format={header['format']!r}: this version reads {FORMAT!r}; pack it again")
        shapes = tuple(SiteShape(*shape) for shape in header["shapes"])
        outer = tuple(SiteShape(*shape) for shape in header.get("outer", ()))
        base = BaseShape(header["num_layers"], shapes, outer)
        invocation = tuple(header.get("invocation", ()))
        if len(invocation) > MOST_INVOCATION_TOKENS or any(
            type(each) is not int or each < 0 for each in invocation
        ):
            raise InvalidHeader("its invocation is no list of token ids: pack the adapter again")
        modules = (Module(*module) for module in header["modules"])
        return packed_layout(base, _DTYPES[header["dtype"]], modules, invocation)
    except InvalidHeader:
        raise
    except (LookupError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise InvalidHeader(f"not a packed form's header ({error!r}): pack the adapter again") from error


def view(rows: Tensor, layout: PackedLayout, digest: str) -> AdapterWeights:
    """View the adapter's weights in `rows` ([at least nbytes] uint8, aligned to ALIGNMENT, any device)."""
    elements = rows[: layout.nbytes].view(layout.dtype)
    scales = _scales(layout).to(rows.device)
    groups: dict[tuple[int, SiteGroup], GroupWeights] = {}
    rank_start = 0
    for place in layout.places:
        shape = (place.rank, layout.base.of(place.modules[0].site).in_features)
        groups[place.layer, place.group] = GroupWeights(
            A=matrix(elements, place.a_start, shape),
            scale=scales[rank_start : rank_start + place.rank],
            parts=tuple(_parts(elements, place, layout.base)),
        )
        rank_start += place.rank
    return AdapterWeights(digest, groups)


def inertia(layout: PackedLayout, rows: Tensor) -> str:
    """Say why an adapter changes no output at all: rows is its packed form; "" if it may change some."""
    causes: set[str] = set()
    values = (
        rows & 0x7F if layout.dtype.itemsize == 1 else rows.view(layout.dtype)
    )  # bytes without their sign
    for place in layout.places:
        a_start = place.a_start
        for module, bt_start in zip(place.modules, place.bt_starts, strict=True):
            shape = layout.base.of(module.site)
            A = matrix(values, a_start, (module.rank, shape.in_features))
            Bt = matrix(values, bt_start, (module.rank, shape.out_features))
            a_start += A.numel()
            if module.scale == 0:
                causes.add("lora_alpha is 0")
            elif not Bt.any():
                causes.add("all lora_B are zero, as before any training")
            elif not A.any():
                causes.add("all lora_A are zero")
            else:
                return ""
    return " and ".join(sorted(causes))


def matrix(elements: Tensor, start: int, shape: tuple[int, int]) -> Tensor:
    """View the contiguous matrix of `shape` that begins at element `start` of `elements`."""
    return elements[start : start + shape[0] * shape[1]].view(shape)


def _parts(elements: Tensor, place: PackedGroup, base: BaseShape) -> Iterable[SitePart]:
    """Find the group's present sites: their rows of the stacked A and their columns of the fused output."""
    present = {m.site: (m, start) for m, start in zip(place.modules, place.bt_starts, strict=True)}
    rank_start = out_start = 0
    for site in place.group.sites:
        width = base.of(site).out_features
        if site in present:
            module, start = present[site]
            rank_stop = rank_start + module.rank
            Bt = matrix(elements, start, (module.rank, width))
            yield SitePart(rank_start, rank_stop, out_start, out_start + width, Bt)
            rank_start = rank_stop
        out_start += width


def _scales(layout: PackedLayout) -> Tensor:
    """List every rank row's scale, module after module: [sum of ranks] float32."""
    modules = layout.modules
    scales = torch.tensor([m.scale for m in modules], dtype=torch.float32)
    return scales.repeat_interleave(torch.tensor([m.rank for m in modules]))


def _round_up(count: int, step: int) -> int:
    return -(-count // step) * step


def digest_of(layout: PackedLayout, rows: Tensor) -> str:
    """Return the content's identity: BLAKE3 (hex) of header and rows. rows: [nbytes] uint8 on the host.

    Every pulled adapter is digested before it is served, and SHA-256 takes several times as long for it as a network
    takes to bring it. (O'Connor, Aumasson, Neves, Wilcox-O'Hearn: BLAKE3, one function, fast everywhere, 2020.)
    """
    content = blake3(write_header(layout).encode())
    content.update(rows.numpy().data)
    return content.hexdigest()
