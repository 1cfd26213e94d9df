"""Make what all roles need: trust, the profile that costs are told by, names, and a way to the coordinator."""

import hashlib
import socket
import time
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

from engine.cluster.control.control_client import CoordinatorConnection
from engine.cluster.trusted_channels import call_metadata, member_channel
from engine.config.config import ServeConfig
from engine.config.peer_config import trust
from engine.errors import InvalidConfig
from lora.format.adapter_files import Flaw, read_regular_file
from scheduler.cluster.cost.model import CostModel, Kernel
from scheduler.cluster.cost.profile import Profile, from_json
from scheduler.cluster.policies import Setting
from transport.base import Address
from transport.control.security import Security
from transport.errors import HelloRefused

_PROFILES = {"cpu": "cpu_100m.json", "cuda": "h100_llama8b.json"}
_MOST_PROFILE_BYTES = 1 << 20
_CUDA_DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/dxg"))  # the second is Windows' for Linux
KERNEL = Kernel.EXACT  # this engine's


def start_ms() -> int:
    """Return the milliseconds at which this process counts as begun: larger than of any earlier one of its name."""
    return int(time.time() * 1000)


@dataclass(frozen=True, slots=True)
class Costs:
    """What a node's steps cost by its profile, under the operator's SLO. `digest` tells profiles apart.

    Loads and paces are told relative to a profile, so all members of a cluster need the same.
    """

    profile: Profile
    digest: str

    @property
    def model(self) -> CostModel:
        """Return what this engine's kernels cost."""
        return self.profile.model(KERNEL)

    def setting(self, routers: int) -> Setting:
        """Return what policies are made for."""
        lengths = self.profile.lengths
        return Setting(
            model=self.model,
            slo=self.profile.slo,
            mean_output_tokens=lengths.output_tokens,
            mean_prompt_tokens=lengths.prompt_tokens,
            routers=routers,
        )


def costs_of(config: ServeConfig) -> Costs:
    """Read the profile that the operator gave, or that is shipped for this kind of device. Raises InvalidConfig."""
    given = config.cluster.profile
    try:
        content = _shipped_profile(config) if given is None else _profile_file(given)
        profile = from_json(content.decode())
        profile.model(KERNEL)
    except (OSError, Flaw, ValueError, KeyError) as error:
        remedy = f"{error}: give a file that scripts.profile_node wrote for {KERNEL.value} kernels"
        raise InvalidConfig("profile", str(given), remedy) from error
    return Costs(replace(profile, slo=config.cluster.slo), hashlib.sha256(content).hexdigest())


def _shipped_profile(config: ServeConfig) -> bytes:
    has_cuda = config.engine.device != "cpu" and _sees_cuda()
    return (files("scheduler.cluster") / "profiles" / _PROFILES["cuda" if has_cuda else "cpu"]).read_bytes()


def _sees_cuda() -> bool:
    """Return whether torch sees a CUDA device; where there is no driver it is not asked."""
    if not any(driver.exists() for driver in _CUDA_DRIVERS):
        return False
    import torch  # noqa: PLC0415 - a coordinator and a router compute nothing, and it takes seconds

    return torch.cuda.is_available()


def _profile_file(path: Path) -> bytes:
    return bytes(read_regular_file(path, _MOST_PROFILE_BYTES))


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
