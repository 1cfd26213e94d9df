"""Pieces: how one sequence of spans is laid over another of the same total."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Span(NamedTuple):
    """`nbytes` at `address`."""

    address: int
    nbytes: int


def pair(source: Sequence[Span], target: Sequence[Span], most_bytes: int) -> Iterator[tuple[int, int, int]]:
    """(source address, target address, bytes) of pieces of at most `most_bytes`, in order, none crossing a border."""
    assert sum(span.nbytes for span in source) == sum(span.nbytes for span in target)
    targets = iter(target)
    to, room = next(targets)
    for start, left in source:
        address = start
        while left:
            if not room:
                to, room = next(targets)
            nbytes = min(left, room, most_bytes)
            yield address, to, nbytes
            address, to, left, room = address + nbytes, to + nbytes, left - nbytes, room - nbytes
