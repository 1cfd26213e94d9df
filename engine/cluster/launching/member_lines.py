"""Write the command lines of a cluster's members, whoever starts them: a coordinator, nodes and routers.

Lines travel to other machines and into lists of processes: no secret may be in them.
"""

import socket
from collections.abc import Sequence
from dataclasses import dataclass

from engine.config.config import ServeConfig
from engine.config.launch_config import LaunchConfig
from engine.config.option import options_of
from engine.config.option_types import FLAG

LOCAL = "127.0.0.1"
KINDS = ("router", "node", "coordinator")
"""Every kind of member, in the order in which they are ended."""

SCALER = "scaler"

_OWN_OPTIONS = {
    **dict.fromkeys(
        ("--nodes", "--routers", "--port", "--host", "--registry-file", "--batch-dir", "--grpc-port"), 1
    ),
    **{f"--{option.name}": int(option.type is not FLAG) for option in options_of(LaunchConfig)},
    **{f"--no-{option.name}": 0 for option in options_of(LaunchConfig) if option.type is FLAG},
}


@dataclass(frozen=True, slots=True)
class Part:
    """One process of the cluster: its name, and the module that it runs with which arguments."""

    name: str
    arguments: tuple[str, ...]
    module: str = "engine.serve"


@dataclass(frozen=True, slots=True)
class MemberLines:
    """What a cluster's members are told: all of them the same, beside where they listen.

    `host`, `port` and `grpc_port` are what clients reach the first router by; the next ones have consecutive ports.
    """

    shared: tuple[str, ...]
    coordinator: str
    registry: str | None
    routers: int
    host: str
    port: int
    grpc_port: int | None
    batches: str | None

    @classmethod
    def of(cls, arguments: Sequence[str], config: ServeConfig, coordinator: str) -> "MemberLines":
        """Take from the launcher's own line what all members are told too."""
        trust = ("--peer-plain",) if config.engine.peers.tls_cert is None else ()
        registry, batches = config.cluster.registry_file, config.batches.batch_dir
        return cls(
            (*_without(arguments, _OWN_OPTIONS), *trust), coordinator, str(registry) if registry else None,
            config.cluster.routers, config.host, config.port, config.grpc_port, str(batches) if batches else None,
        )  # fmt: skip

    def coordinator_part(self, http: tuple[str, int]) -> Part:
        """Return the coordinator, which shows itself over HTTP at `http`."""
        kept = ("--registry-file", self.registry) if self.registry else ()
        listen = ("--cluster-listen", self.coordinator, "--routers", str(self.routers))
        listen += ("--host", http[0], "--port", str(http[1]))
        return Part("coordinator", (*self.shared, "--role", "coordinator", *listen, *kept))

    def node(self, at: int, listen: str, peers: str, http: tuple[str, int]) -> Part:
        """Return a node that hears routers at `listen`, peers at `peers` and HTTP at `http`."""
        # Nodes may find the option in a file or the environment: what they are told here wins.
        any_grpc = () if self.grpc_port is None else ("--grpc-port", "0")
        own = ("--cluster-listen", listen, "--peer-listen", peers, "--host", http[0], "--port", str(http[1]))
        return Part(f"node-{at}", (*self._member("node", at), *own, *any_grpc))

    def router(self, at: int) -> Part:
        """Return a router."""
        rpc = () if self.grpc_port is None else ("--grpc-port", str(self.grpc_port and self.grpc_port + at))
        own = ("--host", self.host, "--port", str(self.port and self.port + at))
        own += ("--batch-dir", self.batches) if self.batches else ()
        return Part(f"router-{at}", (*self._member("router", at), "--routers", str(self.routers), *own, *rpc))

    def scaler(self, told: tuple[str, ...]) -> Part:
        """Return what keeps the number of nodes on Ray, which is `told` between which numbers."""
        own = ("--launcher", "ray", *told, "--peer-listen", f"{LOCAL}:0")
        return Part(SCALER, (*self.shared, *own), "engine.cluster.launching.ray_scaler")

    def _member(self, role: str, at: int) -> tuple[str, ...]:
        name = ("--node-name", f"{role}-{at}")
        return (*self.shared, "--role", role, "--coordinator", self.coordinator, *name)


def _without(arguments: Sequence[str], options: dict[str, int]) -> tuple[str, ...]:
    """Leave out options, with so many values after each, written `--name value` or `--name=value`."""
    kept: list[str] = []
    skip = 0
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if skip:
            skip -= 1
        elif name in options:
            skip = 0 if equals else options[name]
        else:
            kept.append(argument)
    return tuple(kept)


def free_ports(host: str, count: int) -> list[int]:
    """Return ports of this machine that nobody listens at now, all different."""
    sockets = [socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) for _ in range(count)]
    try:
        for each in sockets:
            each.bind((host, 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
