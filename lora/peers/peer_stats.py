"""Count what was pulled from peers, and what is kept for them. It may not know torch: metrics are made of it."""

from dataclasses import astuple, dataclass


@dataclass(frozen=True, slots=True)
class PeerStats:
    """Counts since the start. `pulls` took `seconds` and brought `nbytes`; `refused` of them had another digest.

    `absent` counts holders that had let the content go, `failed` those that died or were too slow.
    """

    pulls: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    refused: int = 0
    absent: int = 0
    failed: int = 0

    def __add__(self, more: "PeerStats") -> "PeerStats":
        return PeerStats(*(mine + other for mine, other in zip(astuple(self), astuple(more), strict=True)))


@dataclass(frozen=True, slots=True)
class PublishStats:
    """Counts since the start: `copies` made in host memory for peers, `crowded` contents that found no room there.

    `free_pages` of the copies' pages hold nothing.
    """

    copies: int = 0
    crowded: int = 0
    free_pages: int = 0
