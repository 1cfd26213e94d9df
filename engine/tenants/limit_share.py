"""Divide limits among the routers of a cluster, so that together they let through what one of them might alone."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LimitShare:
    """What one of `of` doors may give out: the door of number `at` in their order."""

    at: int = 0
    of: int = 1

    @classmethod
    def among(cls, name: str, doors: Iterable[str]) -> "LimitShare":
        """Return the share of the door `name`; it is counted too, if it is not among `doors` yet."""
        ordered = sorted({name, *doors})
        return cls(ordered.index(name), len(ordered))

    def rate(self, most: int) -> float:
        """Return the part of what may be used in a while. The parts sum to `most`."""
        return most / self.of

    def count(self, most: int) -> int:
        """Return the part of what may be under way at once.

        The parts sum to `most`, but each is 1 at least: a door that never let anybody in would be of no use. 0, which
        is any number, stays so.
        """
        return most and max(1, most // self.of + (self.at < most % self.of))


WHOLE = LimitShare()
