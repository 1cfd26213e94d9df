"""Hold how many nodes an operator wants: a number, or the least and the most between which the cluster chooses."""

import re
from dataclasses import dataclass
from pathlib import Path

from engine.config.option_types import OptionType

_MOST_NODES = 2**31
_WRITTEN = re.compile(r"(\d{1,10})(?::(\d{1,10}))?", re.ASCII)
_REMEDY = f"give a whole number from 1 to {_MOST_NODES}, or MIN:MAX of two such numbers"


@dataclass(frozen=True, slots=True, repr=False)
class NodeRange:
    """At least and at most so many nodes."""

    lowest: int
    highest: int

    @classmethod
    def of(cls, nodes: "int | NodeRange") -> "NodeRange":
        """Return a range of one number, or the range that was given."""
        return nodes if isinstance(nodes, NodeRange) else cls(nodes, nodes)

    @property
    def is_open(self) -> bool:
        """Return whether there is anything to choose."""
        return self.lowest < self.highest

    def __repr__(self) -> str:
        return f"{self.lowest}:{self.highest}"


Nodes = int | NodeRange
"""What an option that asks for nodes may have as its value."""


def _parse(raw: str, base: Path) -> Nodes:
    written = _WRITTEN.fullmatch(raw)
    if written is None:
        raise ValueError(_REMEDY)
    return int(written[1]) if written[2] is None else NodeRange(int(written[1]), int(written[2]))


def _check(value: object) -> None:
    """Accept a number, or two of which the first is not the larger."""
    match value:
        case bool():
            raise ValueError(_REMEDY)
        case int() if 1 <= value <= _MOST_NODES:
            pass
        case NodeRange(lowest, highest) if 1 <= lowest <= highest <= _MOST_NODES:
            pass
        case _:
            raise ValueError(_REMEDY)


NODES = OptionType("N|MIN:MAX", _parse, _check)
