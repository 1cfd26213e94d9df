"""Read what a command of this folder is given, and end it in one line where that cannot be used."""

import argparse
import math
import sys
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager

from engine.errors import EngineError

_MOST = 1_000_000
FAILURE = 1


def count(text: str) -> int:
    """Parse a whole number of at least 1."""
    number = _integer(text)
    if not 1 <= number <= _MOST:
        raise argparse.ArgumentTypeError(f"{text!r} is out of range: give a number from 1 to {_MOST}")
    return number


def counts(text: str) -> list[int]:
    """Parse a comma-separated list of whole numbers of at least 1."""
    return [count(part) for part in text.split(",")]


def seconds(text: str) -> float:
    """Parse a time, 0 or more."""
    number = _real(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: give seconds, 0 or more")
    return number


def positive(text: str) -> float:
    """Parse a finite number above 0."""
    number = _real(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is out of range: give a number above 0")
    return number


def not_negative(text: str) -> float:
    """Parse a finite number, 0 or more."""
    number = _real(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is out of range: give a number, 0 or more")
    return number


def share(text: str) -> float:
    """Parse a part of a whole, from 0 to 1."""
    number = _real(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share: give a number from 0 to 1")
    return number


def rate(text: str) -> float:
    """Parse arrivals per second: above 0, or `inf`."""
    number = _real(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no rate: give a number above 0, or inf")
    return number


def span(text: str) -> tuple[int, int]:
    """Parse `LOW-HIGH`, or one number for both."""
    low, _, high = text.partition("-")
    found = count(low), count(high or low)
    if found[0] > found[1]:
        raise argparse.ArgumentTypeError(f"{text!r} ends before it begins: give LOW-HIGH")
    return found


def some_of(names: Collection[str]) -> Callable[[str], list[str]]:
    """Return what parses a comma-separated list of some of `names`."""

    def parse(text: str) -> list[str]:
        given = text.split(",")
        for name in given:
            if name not in names:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(names)}")
        return given

    return parse


def _real(text: str) -> float:
    """Read a number; NaN for what is none, which no range holds."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None


@contextmanager
def one_line(command: str) -> Generator[None]:
    """End the process with one line, and `FAILURE`, for a file or a value that `command` cannot use."""
    try:
        yield
    except (EngineError, OSError, ValueError) as error:
        told = " ".join(str(error).split()) or type(error).__name__
        sys.stderr.write(f"python -m {command}: {told}\n")
        raise SystemExit(FAILURE) from None
