"""Hold what an operator says of a tenant: who it is, what it may use and how much of that.

A tenant is whoever requests belong to. It has one or more API keys.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import sha256


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """How much may be asked. None is no limit. Tokens are those of prompts and answers together."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None


NO_LIMITS = TenantLimits()


@dataclass(frozen=True, slots=True)
class Tenant:
    """One tenant. Without a table of its own a key is a tenant that may use everything, without limits.

    `adapters` are patterns as of fnmatch; `base` says whether it may use the base model. `adapter_limits` are the
    limits of each adapter by itself: those of the first pattern that matches its name, or that of the base model.
    Of what waits, the lower `priority` goes first: no request of a tenant has a lower one than it.
    """

    name: str
    key_digests: frozenset[str] = frozenset()
    adapters: tuple[str, ...] = ("*",)
    base: bool = True
    limits: TenantLimits = NO_LIMITS
    adapter_limits: tuple[tuple[str, TenantLimits], ...] = ()
    weight: float = 1.0
    priority: int = 0

    def may_use(self, model: str, is_base: bool) -> bool:
        """Tell whether a request of this tenant may name `model`."""
        return self.base if is_base else any(fnmatchcase(model, pattern) for pattern in self.adapters)

    def limits_of(self, model: str) -> TenantLimits:
        """Return the limits of one adapter, or of the base model, by itself."""
        matching = (limits for pattern, limits in self.adapter_limits if fnmatchcase(model, pattern))
        return next(matching, NO_LIMITS)


def key_digest(key: str) -> str:
    """Return the SHA-256 of a key, in hexadecimal digits."""
    return sha256(key.encode(errors="surrogatepass")).hexdigest()


def weights_of(tenants: Iterable[Tenant]) -> dict[str, float]:
    """Return how tenants are weighed where all want more than there is."""
    return {tenant.name: tenant.weight for tenant in tenants}
