"""Deadline: a point in time by which something must have ended, however many steps it takes."""

import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Deadline:
    """A point of the monotonic clock, in seconds."""

    at_s: float

    @classmethod
    def after(cls, seconds: float) -> "Deadline":
        """The point `seconds` from now."""
        return cls(time.monotonic() + seconds)

    def left_s(self) -> float:
        """Seconds that remain; TimeoutError when none do, so that no step is begun too late."""
        left = self.at_s - time.monotonic()
        if left <= 0:
            raise TimeoutError("the deadline has passed")
        return left

    def passed(self) -> bool:
        """True from the deadline on."""
        return time.monotonic() >= self.at_s

    def sooner(self, seconds: float) -> "Deadline":
        """The point `seconds` before."""
        return Deadline(self.at_s - seconds)

    def at_most(self, seconds: float) -> "Deadline":
        """This deadline, or `seconds` from now if that is sooner."""
        return Deadline(min(self.at_s, time.monotonic() + seconds))
