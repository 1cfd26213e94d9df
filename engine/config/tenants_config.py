"""Hold what an operator may choose of tenants: the file that names them, and where their use is kept."""

from collections.abc import Collection
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

from engine.config.access_config import AccessConfig
from engine.config.cluster_config import ClusterConfig
from engine.config.option import Option, check_fields
from engine.config.option_types import FILE, READABLE_FILE, whole_number
from engine.errors import InvalidConfig
from engine.tenants.tenant import Tenant, key_digest
from engine.tenants.tenants_file import TenantsFlaw, read_tenants


@dataclass(frozen=True, slots=True)
class TenantsConfig:
    """Who may use what, and how much of it. Without a file each API key is a tenant without limits."""

    _: KW_ONLY
    file: Annotated[
        Path | None,
        Option(
            "tenants", READABLE_FILE, "TOML file of tenants: their keys, adapters and limits", "tenants",
            note="it is read again when it changes",
        ),
    ] = None  # fmt: skip

    usage_file: Annotated[
        Path | None,
        Option(
            "tenants", FILE, "SQLite file that keeps what tenants use, by day and adapter", note="none: it is not kept"
        ),
    ] = None  # fmt: skip
    usage_days: Annotated[
        int, Option("tenants", whole_number("N", 1, 36_500), "days that it keeps, today included")
    ] = 400

    def __post_init__(self) -> None:
        check_fields(self)
        self.read()

    def read(self) -> tuple[Tenant, ...]:
        """Return the tenants of the file; none without one. Raises InvalidConfig."""
        if self.file is None:
            return ()
        try:
            return read_tenants(self.file)
        except TenantsFlaw as error:
            raise InvalidConfig("tenants", str(self.file), str(error)) from error

    def read_for(self, access: AccessConfig, cluster: ClusterConfig) -> tuple[Tenant, ...]:
        """Return the tenants of a server. Raises InvalidConfig for what its other options contradict."""
        tenants = self.read()
        if tenants and cluster.tenant_weights:
            weight = next(iter(cluster.tenant_weights))
            remedy = "there is a file of tenants: write `weight` in their tables there"
            raise InvalidConfig("tenant_weight", weight, remedy)
        self._check(tenants, {key_digest(key) for key in access.read_admin_keys()})
        return tenants

    def _check(self, tenants: Collection[Tenant], admin_digests: Collection[str]) -> None:
        for tenant in tenants:
            for digest in sorted(tenant.key_digests & set(admin_digests)):
                remedy = f"[tenants.{tenant.name}] has the admin key {digest[:8]}: give it an API key"
                raise InvalidConfig("tenants", str(self.file), remedy)
