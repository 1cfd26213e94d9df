"""Which adapters there are: drawn up by a mix of ranks, or read from a list.

Text in, values out; reading files is left to whoever has a file system.
"""

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from lora.adapter import AdapterRef

BYTES_PER_RANK = 5 * 2**20  # all seven sites of Llama-3.1-8B in bf16
_FIELDS = ("name", "rank", "bytes", "share")


class InvalidCatalogue(ValueError):
    """A mix of ranks or a list of adapters that cannot be read; says which entry and the remedy."""


@dataclass(frozen=True, slots=True)
class RankMix:
    """Ranks of a catalogue as (rank, part), the parts summing to 1. Where it `shifts` the hot rank moves from
    the lowest to the highest over a run (see `popularity`)."""

    name: str
    parts: tuple[tuple[int, float], ...]
    shifts: bool = False


_EQUAL_PARTS = ((8, 0.2), (16, 0.2), (32, 0.2), (64, 0.2), (128, 0.2))
EQUAL = RankMix("equal", _EQUAL_PARTS)
SKEWED = RankMix("skewed", ((8, 0.7), (16, 0.2), (64, 0.08), (128, 0.02)))
SHIFTING = RankMix("shifting", _EQUAL_PARTS, shifts=True)
MIXES = {mix.name: mix for mix in (EQUAL, SKEWED, SHIFTING)}


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Adapters in order; `shares` are their parts of the traffic where those are known, summing to 1."""

    adapters: tuple[AdapterRef, ...]
    shares: tuple[float, ...] | None = None


def rank_mix(text: str) -> RankMix:
    """Read a mix by name, or from `rank:part,rank:part,...` with parts in any unit."""
    if text in MIXES:
        return MIXES[text]
    try:
        pairs = [(int(rank), float(part)) for rank, part in (pair.split(":") for pair in text.split(","))]
    except ValueError as error:
        raise InvalidCatalogue(
            f"ranks={text!r}: give one of {', '.join(MIXES)}, or rank:part,rank:part,..."
        ) from error
    total = sum(part for _, part in pairs)
    if min(rank for rank, _ in pairs) < 1 or min(part for _, part in pairs) < 0 or total <= 0:
        raise InvalidCatalogue(f"ranks={text!r}: give ranks of 1 or more and parts that sum to more than 0")
    return RankMix(text, tuple((rank, part / total) for rank, part in pairs))


def catalogue(count: int, mix: RankMix, bytes_per_rank: int = BYTES_PER_RANK) -> tuple[AdapterRef, ...]:
    """Draw up `count` adapters whose ranks follow `mix` as evenly as can be.

    They are interleaved, so that a popular adapter may have any rank.
    """
    owed = dict.fromkeys((rank for rank, _ in mix.parts), 0.0)
    refs: list[AdapterRef] = []
    for at in range(count):
        for rank, part in mix.parts:
            owed[rank] += part
        rank = max(owed, key=lambda rank: owed[rank])
        owed[rank] -= 1
        refs.append(_ref(at, f"adapter-{at}", rank, rank * bytes_per_rank))
    return tuple(refs)


def read_catalogue(text: str, bytes_per_rank: int = BYTES_PER_RANK) -> Catalogue:
    """Read a list of adapters with name, rank and, where wanted, bytes and share.

    It is a JSON list of objects, a CSV with a header, or lines of `name,rank[,bytes][,share]`. Shares are in
    any unit; give them for all or none.
    """
    rows = _json_rows(text) if text.lstrip().startswith(("[", "{")) else _line_rows(text)
    entries = [_entry(row, at, bytes_per_rank) for at, row in enumerate(rows)]
    if not entries:
        raise InvalidCatalogue("the list of adapters is empty: give name,rank[,bytes][,share] on each line")
    names = [ref.name for ref, _ in entries]
    twice = next((name for at, name in enumerate(names) if name in names[:at]), None)
    if twice is not None:
        raise InvalidCatalogue(f"adapter {twice!r} is listed twice: give each once")
    return Catalogue(tuple(ref for ref, _ in entries), _normalised([share for _, share in entries]))


def _ref(at: int, name: str, rank: int, nbytes: int) -> AdapterRef:
    return AdapterRef(f"{at:08x}", name, rank, ("q_proj",), nbytes)


def _json_rows(text: str) -> Iterable[Mapping[str, Any]]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidCatalogue(f"the list of adapters is not JSON: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in cast("list[object]", rows)):
        raise InvalidCatalogue('the list of adapters is to be [{"name": ..., "rank": ...}, ...]')
    return cast("list[dict[str, Any]]", rows)


def _line_rows(text: str) -> Iterable[Mapping[str, Any]]:
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if lines and "name" in [field.strip() for field in lines[0].split(",")]:
        return list(csv.DictReader(lines, skipinitialspace=True))
    plain = (line if "," in line else ",".join(line.split()) for line in lines)
    return [dict(row) for row in csv.DictReader(plain, _FIELDS, skipinitialspace=True)]


def _entry(row: Mapping[str, Any], at: int, bytes_per_rank: int) -> tuple[AdapterRef, float | None]:
    name = row.get("name")
    if name in (None, ""):
        raise InvalidCatalogue(f"adapter {at + 1} has no name: give name,rank[,bytes][,share]")
    where = f"adapter {at + 1} ({str(name).strip()!r})"
    rank = _whole(where, "rank", row.get("rank"))
    nbytes = _whole(where, "bytes", row.get("bytes") or rank * bytes_per_rank)
    return _ref(at, str(name).strip(), rank, nbytes), _share(where, row.get("share"))


def _whole(where: str, field: str, given: Any) -> int:
    try:
        value = int(given)
    except (OverflowError, TypeError, ValueError):
        value = 0
    if value < 1:
        found = "nothing" if given is None else repr(given)
        raise InvalidCatalogue(
            f"{where}, {field}: found {found}: give a whole number of 1 or more, in a list of "
            "name,rank[,bytes][,share]"
        )
    return value


def _share(where: str, given: Any) -> float | None:
    if given in (None, ""):
        return None
    try:
        value = float(given)
    except (TypeError, ValueError):
        value = -1.0
    if not 0 <= value < float("inf"):
        raise InvalidCatalogue(f"{where}, share: found {given!r}: give a number of 0 or more, or nothing")
    return value


def _normalised(shares: list[float | None]) -> tuple[float, ...] | None:
    given = [share for share in shares if share is not None]
    if not given:
        return None
    if len(given) < len(shares) or sum(given) <= 0:
        raise InvalidCatalogue("share is given for some adapters only, or all are 0: give it for all or none")
    return tuple(share / sum(given) for share in given)
