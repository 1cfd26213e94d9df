"""TenantTurns: whose turn it is among tenants of which requests wait, by the tokens that each was given."""

from collections.abc import Iterable, Mapping


class TenantTurns:
    """Virtual token counters (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024).

    A tenant's counter is what it was given, over its weight: a prompt's tokens that had to be computed, when it is
    admitted, and each token that was drawn. Of tenants that wait the one with the least counter is next. One that
    begins to wait is raised to the least of the others, or to whoever was admitted last: nobody saves turns up.
    """

    def __init__(self) -> None:
        """Have all tenants in one line, until it is started."""
        self.is_on = False
        self._weights: Mapping[str, float] = {}
        self._given: dict[str, float] = {}
        self._last = ""  # who was admitted last

    def start(self) -> None:
        """Let tenants have turns; to be called before anything waits."""
        self.is_on = True

    def weigh(self, weights: Mapping[str, float]) -> None:
        """Weigh tenants so from now on; others weigh 1. Any thread may call it."""
        self._weights = dict(weights)

    def given(self, tenant: str) -> float:
        """Return a tenant's counter."""
        return self._given.get(tenant, 0.0)

    def join(self, tenant: str, others: Iterable[str]) -> None:
        """Take in that a tenant begins to wait, beside `others`."""
        least = min(map(self.given, others), default=self.given(self._last))
        self._given[tenant] = max(self.given(tenant), least)

    def admitted(self, tenant: str, prompt_tokens: int) -> None:
        """Charge a tenant for a prompt."""
        self._last = tenant
        self.charge(tenant, prompt_tokens)

    def charge(self, tenant: str, tokens: int) -> None:
        """Charge a tenant for tokens."""
        self._given[tenant] = self.given(tenant) + tokens / self._weights.get(tenant, 1.0)
