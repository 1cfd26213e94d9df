"""Count what is used of one set of limits, and tell how much is left and when there will be more."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from engine.tenants.limit_share import LimitShare
from engine.tenants.tenant import TenantLimits
from engine.tenants.token_bucket import TokenBucket

MINUTE_S = 60.0
_KINDS = ("requests", "tokens")


@dataclass(frozen=True, slots=True)
class Lack:
    """What is lacking for a request: of what, of how much in all, and for how long if that is known."""

    what: str
    limit: int
    wait_s: float


@dataclass(frozen=True, slots=True)
class Rate:
    """What a client is told of a limit a minute."""

    limit: int
    remaining: int
    reset_s: float


class Meter:
    """What is left of a share of `limits`. Requests and tokens flow in over a minute; concurrent requests end.

    What is more than the share and within the limit is let in when all of the share is there, and is a debt then: so
    nothing is refused for ever because a limit is divided, and no more flows.
    """

    def __init__(self, limits: TenantLimits, share: LimitShare, now_s: float) -> None:
        """Begin with nothing used."""
        self._buckets: dict[str, TokenBucket] = {}
        self.running = 0
        self.adopt(limits, share, now_s)

    def adopt(self, limits: TenantLimits, share: LimitShare, now_s: float) -> None:
        """Hold other limits, or another share, from now on; what was used stays used."""
        self._most = limits.concurrent and share.count(limits.concurrent)
        self._rates = _rates(limits)
        before, self._buckets = self._buckets, {}
        for kind, most in self._rates.items():
            capacity = share.rate(most)
            bucket = self._buckets[kind] = before.get(kind) or TokenBucket(capacity, MINUTE_S, now_s)
            bucket.resize(capacity, now_s)

    def is_fresh(self, now_s: float) -> bool:
        """Tell whether nothing is used: a new meter would say the same."""
        return not self.running and all(each.level(now_s) >= each.capacity for each in self._buckets.values())

    def lacks(self, requests: int, tokens: int, now_s: float) -> list[Lack]:
        """List what is lacking for requests with so many tokens together; what there never is waits for ever."""
        found: list[Lack] = []
        for kind, amount in zip(_KINDS, (requests, tokens), strict=True):
            bucket, most = self._buckets.get(kind), self._rates.get(kind, 0)
            if bucket is None:
                continue
            wait_s = math.inf if amount > most else bucket.wait_s(min(amount, bucket.capacity), now_s)
            if wait_s:
                found.append(Lack(f"{kind} per minute", most, wait_s))
        if self._most is not None and self.running + requests > self._most:
            wait_s = math.inf if requests > self._most else 0.0  # nobody knows when one ends
            found.append(Lack("requests at once", self._most, wait_s))
        return found

    def most_tokens(self) -> float:
        """Return the most tokens that there are together."""
        bucket = self._buckets.get("tokens")
        return math.inf if bucket is None else bucket.capacity

    def take(self, tokens: int, now_s: float) -> None:
        """Count a request that begins, with the tokens that it may use."""
        self.running += 1
        self._change("requests", 1, now_s)
        self._change("tokens", tokens, now_s)

    def give_back(self, requests: int, tokens: int, now_s: float) -> None:
        """Count a request that has ended, and what was taken for it and not used; below 0 it used more."""
        self.running -= 1
        self._change("requests", -requests, now_s)
        self._change("tokens", -tokens, now_s)

    def rates(self, now_s: float) -> Mapping[str, Rate]:
        """Return, for each kind that has a limit, what is left of it and when all of it will be."""
        return {kind: _rate(bucket, now_s) for kind, bucket in self._buckets.items()}

    def _change(self, kind: str, amount: int, now_s: float) -> None:
        bucket = self._buckets.get(kind)
        if bucket is not None and amount > 0:
            bucket.take(amount, now_s)
        elif bucket is not None and amount < 0:
            bucket.give_back(-amount, now_s)


def _rates(limits: TenantLimits) -> dict[str, int]:
    amounts = zip(_KINDS, (limits.requests_per_minute, limits.tokens_per_minute), strict=True)
    return {kind: most for kind, most in amounts if most is not None}


def _rate(bucket: TokenBucket, now_s: float) -> Rate:
    """Tell of a share; of less than one, it is one when all of it is there."""
    reset_s = bucket.wait_s(bucket.capacity, now_s)
    whole = 1 if bucket.capacity < 1 and not reset_s else 0
    remaining = max(whole, math.floor(bucket.level(now_s) + 1e-6))
    return Rate(max(1, int(bucket.capacity)), remaining, reset_s)
