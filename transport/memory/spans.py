"""Lay one sequence of spans over another of the same total, and cut it into pieces that are copied one by one."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from transport.base import Region, RemoteRegion


class Span(NamedTuple):
    """`nbytes` at `address`."""

    address: int
    nbytes: int


class CopyPiece(NamedTuple):
    """`nbytes` to copy from address `source` to address `target`."""

    source: int
    target: int
    nbytes: int


def spans(regions: Sequence[Region] | Sequence[RemoteRegion]) -> list[Span]:
    """Return where the regions lie, whichever node they are of."""
    return [Span(region.address, region.nbytes) for region in regions]


def pair(source: Sequence[Span], target: Sequence[Span], most_bytes: int) -> Iterator[CopyPiece]:
    """Cut a copy of `source` to `target` into pieces of at most `most_bytes`, in order, none crossing a border."""
    assert sum(span.nbytes for span in source) == sum(span.nbytes for span in target)
    targets = iter(target)
    to, free = next(targets)
    for start, left in source:
        address = start
        while left:
            if not free:
                to, free = next(targets)
            nbytes = min(left, free, most_bytes)
            yield CopyPiece(address, to, nbytes)
            address, to, left, free = address + nbytes, to + nbytes, left - nbytes, free - nbytes


def batches(
    source: Sequence[Span], target: Sequence[Span], most_bytes: int, most_pieces: int
) -> Iterator[Sequence[CopyPiece]]:
    """Group the copy's pieces, in order, into batches of at most `most_bytes` and `most_pieces`."""
    pieces = pair(source, target, most_bytes)
    while group := list(itertools.islice(pieces, most_pieces)):
        start, total = 0, 0
        for index, piece in enumerate(group):
            if total and total + piece.nbytes > most_bytes:
                yield group[start:index]
                start, total = index, 0
            total += piece.nbytes
        yield group[start:]
