"""Make what all roles need: trust, the profile that costs are told by, names, and a way to the coordinator."""

import socket
import time
from importlib.resources import files

from engine.cluster.control.control_client import CoordinatorConnection
from engine.cluster.trusted_channels import call_metadata, member_channel
from engine.config.config import ServeConfig
from engine.config.peer_config import trust
from engine.errors import InvalidConfig
from scheduler.cluster.cost.model import CostModel, Kernel
from scheduler.cluster.cost.profile import Profile, Slo, from_json
from scheduler.cluster.policies import Setting
from transport.base import Address
from transport.control.security import Security
from transport.errors import HelloRefused

_PROFILES = {"cpu": "cpu_100m.json", "cuda": "h100_llama8b.json"}
KERNEL = Kernel.EXACT  # this engine's


def start_ms() -> int:
    """Return the milliseconds at which this process counts as begun: larger than of any earlier one of its name."""
    return int(time.time() * 1000)


def profile_of(device: str) -> Profile:
    """Return the shipped profile of a kind of device; nodes learn how far they are from it."""
    return from_json(
        (files("scheduler.cluster") / "profiles" / _PROFILES[device]).read_text(encoding="utf-8")
    )


def cost_model(profile: Profile) -> CostModel:
    """Return what a profile says of this engine's kernels."""
    return profile.model(KERNEL)


def setting_of(config: ServeConfig, profile: Profile, routers: int) -> Setting:
    """Return what policies are made for."""
    slo = Slo(config.cluster.slo_ttft_s, config.cluster.slo_tbt_s)
    return Setting(
        model=cost_model(profile),
        slo=slo,
        mean_output_tokens=profile.lengths.output_tokens,
        mean_prompt_tokens=profile.lengths.prompt_tokens,
        routers=routers,
    )


def security_of(config: ServeConfig) -> Security:
    """Return what members demand of each other. Raises InvalidConfig, also for what would travel in the clear."""
    security, cluster = trust(config.engine.peers), config.cluster
    for option, address in (("coordinator", cluster.coordinator), ("cluster_listen", cluster.cluster_listen)):
        try:
            if address is not None:
                security.check_host(address.host)
        except HelloRefused as error:
            flags = "--peer-tls-ca, --peer-tls-cert, --peer-tls-key"
            raise InvalidConfig(option, str(address), f"{error} ({flags})") from error
    return security


def connection_to(coordinator: Address, security: Security) -> CoordinatorConnection:
    """Return how the coordinator is reached."""
    return CoordinatorConnection(lambda: member_channel(str(coordinator), security), call_metadata(security))


def listen_error(option: str, address: Address, error: Exception) -> InvalidConfig:
    """Return what an operator is told of an address that cannot be bound."""
    told = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return InvalidConfig(option, str(address), f"it cannot be bound ({told}): choose another port or host")


def member_name(config: ServeConfig, kind: str, port: int) -> str:
    """Return what a member is called."""
    return config.cluster.node_name or f"{kind}-{socket.gethostname()}-{port}"
