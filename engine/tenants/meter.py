"""Count what is used of one set of limits, and tell how much is left and when there will be more."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

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
    """What is left of `limits`. Requests and tokens flow in over a minute; concurrent requests end."""

    def __init__(self, limits: TenantLimits, now_s: float) -> None:
        """Begin with nothing used."""
        self._most = limits.concurrent
        self._buckets = {kind: TokenBucket(most, MINUTE_S, now_s) for kind, most in _rates(limits).items()}
        self.running = 0

    def adopt(self, limits: TenantLimits, now_s: float) -> None:
        """Hold other limits from now on; what was used stays used."""
        self._most = limits.concurrent
        before, self._buckets = self._buckets, {}
        for kind, most in _rates(limits).items():
            bucket = self._buckets[kind] = before.get(kind) or TokenBucket(most, MINUTE_S, now_s)
            bucket.resize(most, now_s)

    def is_fresh(self, now_s: float) -> bool:
        """Tell whether nothing is used: a new meter would say the same."""
        return not self.running and all(each.level(now_s) >= each.capacity for each in self._buckets.values())

    def lacks(self, requests: int, tokens: int, now_s: float) -> list[Lack]:
        """List what is lacking for requests with so many tokens together; what there never is waits for ever."""
        found: list[Lack] = []
        for kind, amount in zip(_KINDS, (requests, tokens), strict=True):
            bucket = self._buckets.get(kind)
            wait_s = 0.0 if bucket is None else bucket.wait_s(amount, now_s)
            if bucket is not None and wait_s:
                found.append(Lack(f"{kind} per minute", int(bucket.capacity), wait_s))
        if self._most is not None and self.running + requests > self._most:
            wait_s = math.inf if requests > self._most else 0.0  # nobody knows when one ends
            found.append(Lack("requests at once", self._most, wait_s))
        return found

    def most_tokens(self) -> float:
        """Return the most tokens that may be asked for together."""
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
    remaining = max(0, math.floor(bucket.level(now_s) + 1e-6))
    return Rate(int(bucket.capacity), remaining, bucket.wait_s(bucket.capacity, now_s))
