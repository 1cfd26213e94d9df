"""Divide an alias's requests among several adapters by share, the same way wherever it is asked."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Annotated

import msgspec

from engine.errors import InvalidAdapterName
from lora.adapter import MOST_NAME_CHARS
from lora.format.companions import Companions
from scheduler.request import InvalidParameter

MOST_TARGETS = 16
_SUM_TOLERANCE = 1e-6  # of shares that clients write in decimals
_HASH_BYTES = 8


class AliasTarget(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A name that an alias leads to, and the `share` of the alias's requests that it answers, above 0 and at most 1."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=MOST_NAME_CHARS)]
    share: Annotated[float, msgspec.Meta(gt=0, le=1)]


Targets = Annotated[tuple[AliasTarget, ...], msgspec.Meta(max_length=MOST_TARGETS)]
"""Of one alias; none where one adapter answers all its requests."""


class Alias(msgspec.Struct, frozen=True):
    """What an alias was made from: one name, and all its `targets` if it has shares; the first of them is `target`."""

    target: str = ""
    targets: tuple[AliasTarget, ...] = ()


NO_ALIAS = Alias()


def check_targets(alias: str, targets: Sequence[AliasTarget]) -> None:
    """Raise InvalidParameter unless the shares sum to 1, and the names differ from each other and from the alias."""
    names = [each.name for each in targets]
    if alias in names:
        raise InvalidParameter("targets", alias, "it is the alias itself: give other names")
    if twice := [name for name in names if names.count(name) > 1]:
        raise InvalidParameter("targets", twice[0], "it stands there twice: give it one share")
    total = math.fsum(each.share for each in targets)
    if abs(total - 1) > _SUM_TOLERANCE:
        shares = [each.share for each in targets]
        raise InvalidParameter("targets.share", shares, f"they sum to {total:.6g}: give shares that sum to 1")


def check_may_be_target(alias: str, target: str, targets: Sequence[AliasTarget]) -> None:
    """Raise InvalidAdapterName for a target that divides its own requests among `targets`."""
    if targets:
        raise InvalidAdapterName(
            alias, f"its target {target} is an alias with shares: give the adapters that it leads to"
        )


def check_same_prompts(alias: str, companions: Mapping[str, Companions]) -> None:
    """Raise InvalidAdapterName unless all targets make one prompt of one conversation, and end alike."""
    (first, its), *rest = companions.items()
    for name, other in rest:
        if other != its:
            raise InvalidAdapterName(
                alias, f"{first} and {name} differ in chat template or end tokens: choose adapters that agree"
            )


def check_is_no_target(name: str, targets_of: Mapping[str, Sequence[AliasTarget]]) -> None:
    """Raise InvalidAdapterName for a name to which some alias leads by share."""
    for alias, targets in targets_of.items():
        if any(each.name == name for each in targets):
            raise InvalidAdapterName(
                name, f"the alias {alias} leads to it by share: let {alias} lead elsewhere"
            )


def chosen_target(alias: str, targets: Sequence[AliasTarget], key: str) -> str:
    """Return the name that answers the request, or the series of requests, with this key; `alias` without targets.

    It depends on nothing else. While the order of the targets stays, a changed share moves no more keys than it must.
    """
    if not targets:
        return alias
    digest = hashlib.blake2b(f"{alias}\0{key}".encode(), digest_size=_HASH_BYTES).digest()
    place, upper = int.from_bytes(digest) / (1 << 8 * _HASH_BYTES), 0.0
    for each in targets:
        upper += each.share
        if place < upper:
            return each.name
    return targets[-1].name  # the sum is 1 but for rounding
