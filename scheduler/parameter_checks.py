"""Check single values of what a client asked for, and name the field of one that cannot be honoured."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

_MOST_SHOWN_CHARS = 200


class InvalidParameter(ValueError):
    """A request field whose value cannot be honoured; says which, what it was, and what would be accepted."""

    def __init__(self, field: str, value: object, remedy: str) -> None:
        super().__init__(f"{field}={_shown(value)} is not accepted: {remedy}")
        self.field, self.value, self.remedy = field, value, remedy


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN_CHARS else text[: _MOST_SHOWN_CHARS - 1] + "…"


def as_integer(field: str, value: Any) -> int:
    """Return a whole number as an int. Raises InvalidParameter that names `field` for anything else."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise InvalidParameter(field, value, "give a whole number")


def as_integers(field: str, values: object) -> tuple[int, ...]:
    """Return whole numbers as ints. Raises InvalidParameter that names `field` for anything else."""
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise InvalidParameter(field, cast(object, values), "give a list of whole numbers")
    return tuple(as_integer(field, value) for value in cast(Iterable[Any], values))


def check_token_ids(field: str, token_ids: Sequence[int], vocab_size: int) -> None:
    """Raise InvalidParameter that names `field` for an id that the model does not have."""
    if token_ids and (min(token_ids) < 0 or max(token_ids) >= vocab_size):
        wrong = next(each for each in token_ids if not 0 <= each < vocab_size)
        raise InvalidParameter(field, wrong, f"give token ids from 0 to {vocab_size - 1}")
