"""Read single fields of a checkpoint's config.json, and refuse a value of the wrong kind by the field's name."""

from collections.abc import Mapping
from typing import Any, cast, get_args

from model.config import DtypeName, UnsupportedModel

_MOST = 2**31 - 1  # of any size
_MOST_FLOAT = 1e30  # float32 arithmetic must not overflow
_DTYPES: dict[str, DtypeName] = {name: name for name in get_args(DtypeName)}


def read_integer(raw: Mapping[str, Any], field: str, most: int = _MOST) -> int:
    """Return the field's integer, from 1 to `most`."""
    value = raw.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise UnsupportedModel(field, value, f"config.json must give an integer from 1 to {most}")
    return value


def read_number(field: str, value: object, most: float = _MOST_FLOAT, zero: bool = False) -> float:
    """Return the number `value` of `field`, above 0 and at most `most`; with `zero` it may be 0."""
    if (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and 0 <= value <= most
        and (zero or value)
    ):
        return float(value)
    raise UnsupportedModel(field, value, f"config.json must give a number above 0, at most {most:g}")


def read_flag(raw: Mapping[str, Any], field: str) -> bool:
    """Return the field's truth; False where it is left out."""
    value = raw.get(field)
    if value is not None and not isinstance(value, bool):
        raise UnsupportedModel(field, value, "config.json must give true or false")
    return bool(value)


def read_dtype(raw: Mapping[str, Any]) -> DtypeName:
    """Return the weights' dtype, which older files call torch_dtype."""
    name = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    dtype = _DTYPES.get(str(name).removeprefix("torch."))
    if dtype is None:
        raise UnsupportedModel("dtype", name, f"use one of {', '.join(_DTYPES)}")
    return dtype


def read_token_ids(raw: Mapping[str, Any], field: str, vocab_size: int) -> tuple[int, ...]:
    """Return the ids of a field that holds one, several or none; ids that the model cannot draw are left out."""
    value = raw.get(field)
    if value is None:
        return ()
    ids: list[Any] = cast(list[Any], value) if isinstance(value, list) else [value]
    if not all(isinstance(each, int) and not isinstance(each, bool) for each in ids):
        raise UnsupportedModel(field, raw[field], "give a token id, or a list of them")
    return tuple(each for each in ids if 0 <= each < vocab_size)
