"""Keep account of what tenants use, and refuse what they may not use or what is beyond their limits.

It is the same on a single server and on a router: both ask before they take a request, and tell when it begins and
ends. Used on one event loop.
"""

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from engine.errors import BeyondLimit, RateLimited, UnknownModel
from engine.tenants.limit_share import WHOLE, LimitShare
from engine.tenants.meter import Lack, Meter
from engine.tenants.tenant import NO_LIMITS, Tenant, TenantLimits, weights_of
from scheduler.request import MAX_PRIORITY, InvalidParameter, Origin, Request, SamplingParams

_MOST_METERS = 1 << 12  # those beyond are looked through for some that tell nothing


@dataclass(frozen=True, slots=True)
class _Reserved:
    """What a request that runs has taken of which meters."""

    meters: tuple[Meter, ...]
    tokens: int


class TenantAccounts:
    """Meters by tenant and by adapter of a tenant. Without tenants everybody may use everything."""

    def __init__(
        self,
        base_names: Collection[str] = (),
        longest: int = 0,
        clock: Callable[[], float] = time.monotonic,
        weigh: Callable[[Mapping[str, float]], object] = dict[str, float],
    ) -> None:
        """Know no tenant yet. `longest` is the most tokens of a prompt and its answer together.

        `weigh` is told the tenants' weights: it belongs to what orders requests that wait.
        """
        self._base_names, self._longest, self._clock, self._weigh = base_names, longest, clock, weigh
        self.share = WHOLE
        self._tenants: dict[str, Tenant] = {}
        self._meters: dict[tuple[str, str | None], Meter] = {}
        self._reserved: dict[str, _Reserved] = {}

    def adopt(self, tenants: Iterable[Tenant]) -> None:
        """Hold these tenants to what they may from now on; what was used stays used."""
        self._tenants = {tenant.name: tenant for tenant in tenants}
        if self._tenants:
            self._weigh(weights_of(self._tenants.values()))
        self._adopt_limits()

    def divide(self, share: LimitShare) -> None:
        """Give out `share` of all limits from now on: other routers give out the rest."""
        if share != self.share:
            self.share = share
            self._adopt_limits()

    def _adopt_limits(self) -> None:
        now_s = self._clock()
        for (name, model), meter in self._meters.items():
            meter.adopt(self._limits(name, model), self.share, now_s)

    def may_use(self, tenant: str, model: str) -> bool:
        """Tell whether requests of a tenant may name `model`. Any thread may ask."""
        found = self._tenants.get(tenant)
        return found is None or found.may_use(model, model in self._base_names)

    def check_access(self, origin: Origin, model: str) -> int:
        """Return the priority that a request has, which counts from its tenant's on.

        Raises UnknownModel for what its tenant may not use: so nobody learns what others have. Raises InvalidParameter
        for a priority above the tenant's.
        """
        if not self.may_use(origin.tenant, model):
            raise UnknownModel(model)
        if origin.priority < 0:
            remedy = "give 0, the first of what this key may ask, or a greater number to go later"
            raise InvalidParameter("priority", origin.priority, remedy)
        found = self._tenants.get(origin.tenant)
        return min(MAX_PRIORITY, origin.priority + (0 if found is None else found.priority))

    def check(
        self, tenant: str, model: str, prompts: Collection[tuple[int, ...]], params: SamplingParams
    ) -> None:
        """Raise RateLimited where requests that come together have to wait, BeyondLimit where they always would."""
        meters, now_s = self._of(tenant, model), self._clock()
        tokens = sum(self._needed(len(prompt), params, meters) for prompt in prompts)
        lacks = [lack for meter in meters for lack in meter.lacks(len(prompts), tokens, now_s)]
        if not lacks:
            return
        worst = max(lacks, key=lambda lack: lack.wait_s)
        asked = tokens if worst.what.startswith("tokens") else len(prompts)
        if math.isinf(worst.wait_s):
            raise BeyondLimit(asked, worst.what, worst.limit)
        raise RateLimited(worst.what, worst.limit, _retry_after_s(lacks))

    def began(self, request: Request, model: str) -> None:
        """Take what a request may use that was checked and accepted."""
        meters, now_s = self._of(request.tenant, model), self._clock()
        if not meters:
            return
        tokens = self._needed(len(request.prompt_token_ids), request.params, meters)
        self._reserved[request.request_id] = _Reserved(meters, tokens)
        for meter in meters:
            meter.take(tokens, now_s)

    def ended(self, request_id: str, used_tokens: int, was_refused: bool = False) -> None:
        """Give back what a request has not used; all of it, if it `was_refused` after all."""
        reserved, now_s = self._reserved.pop(request_id, None), self._clock()
        if reserved is None:
            return
        unused = reserved.tokens if was_refused else reserved.tokens - used_tokens
        for meter in reserved.meters:
            meter.give_back(int(was_refused), unused, now_s)

    def headers(self, tenant: str, model: str) -> Mapping[str, str]:
        """Return OpenAI's headers for a tenant's requests with `model`: of several limits that with the least left."""
        now_s, told = self._clock(), dict[str, str]()
        places = self._places(tenant, model) if self.may_use(tenant, model) else ()
        meters = [
            self._meters.get(place) or Meter(self._limits(*place), self.share, now_s) for place in places
        ]
        rates = [meter.rates(now_s) for meter in meters]
        for kind in ("requests", "tokens"):
            found = [each[kind] for each in rates if kind in each]
            if not found:
                continue
            least = min(found, key=lambda rate: rate.remaining)
            told[f"x-ratelimit-limit-{kind}"] = str(least.limit)
            told[f"x-ratelimit-remaining-{kind}"] = str(least.remaining)
            told[f"x-ratelimit-reset-{kind}"] = duration(least.reset_s)
        return told

    def _needed(self, prompt: int, params: SamplingParams, meters: Iterable[Meter]) -> int:
        """Return the tokens of a prompt and the longest answers to it.

        Where a client does not say how long they may be, no more is reserved than there may be at all.
        """
        if params.max_tokens is not None:
            return prompt + params.n * params.max_tokens
        needed = prompt + params.n * max(0, self._longest - prompt)
        most = min((meter.most_tokens() for meter in meters), default=math.inf)
        return max(prompt, int(min(needed, most)))

    def _of(self, tenant: str, model: str) -> tuple[Meter, ...]:
        """Return the meters of a tenant's requests with `model`."""
        return tuple(self._meter(*place) for place in self._places(tenant, model))

    def _places(self, tenant: str, model: str) -> list[tuple[str, str | None]]:
        places = ((tenant, None), (tenant, model))
        return [place for place in places if self._limits(*place) != NO_LIMITS]

    def _meter(self, tenant: str, model: str | None) -> Meter:
        found = self._meters.get((tenant, model))
        if found is None:
            now_s = self._clock()
            if len(self._meters) >= _MOST_METERS:
                self._meters = {
                    place: each for place, each in self._meters.items() if not each.is_fresh(now_s)
                }
            found = self._meters[tenant, model] = Meter(self._limits(tenant, model), self.share, now_s)
        return found

    def _limits(self, tenant: str, model: str | None) -> TenantLimits:
        found = self._tenants.get(tenant)
        if found is None:
            return NO_LIMITS
        return found.limits if model is None else found.limits_of(model)


def _retry_after_s(lacks: Iterable[Lack]) -> int:
    """Return the whole seconds after which nothing is lacking any more, at least one."""
    return max(1, *(math.ceil(lack.wait_s) for lack in lacks))


def duration(seconds: float) -> str:
    """Write seconds as OpenAI does: 17ms, 1.5s, 6m0s."""
    milliseconds = math.ceil(seconds * 1000 - 1e-6)
    if milliseconds < 1000:
        return f"{max(0, milliseconds)}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    return (f"{minutes}m" if minutes else "") + f"{rest / 1000:g}s"
