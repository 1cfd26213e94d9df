"""Hold what an operator may say of a cluster: which part of it a process is, and where the others are."""

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Literal

from engine.config.node_range import NODES, NodeRange, Nodes
from engine.config.option import Option, check_fields, options_of
from engine.config.option_types import ADDRESS, COUNT, FILE, SECONDS, TEXT, WEIGHT, one_of
from engine.errors import InvalidConfig
from scheduler.cluster.cost.profile import Slo
from transport.base import Address

Role = Literal["single", "router", "node", "coordinator"]
PolicyName = Literal[
    "ours", "paper", "slora-random", "slora-contiguous", "first-fit", "rendezvous", "least-loaded", "toppings"
]
_CLUSTER_SLO = Slo(2.0, 0.1)


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """Which part of a cluster a process is. A `single` server is a cluster of its own and needs nobody.

    With `nodes` one command starts a coordinator, a router and so many nodes on this machine. Members trust each
    other as peers do: by the peers' token, and by certificates or on one machine only.
    """

    _: KW_ONLY
    role: Annotated[
        Role, Option("cluster", one_of(Role, "ROLE"), "which part of a cluster this process is")
    ] = "single"
    nodes: Annotated[
        Nodes | None,
        Option("cluster", NODES, "start a router, a coordinator and so many nodes, on this machine or by Ray",
               note="with MIN:MAX their number follows the load"),
    ] = None  # fmt: skip
    routers: Annotated[
        int, Option("cluster", COUNT, "routers that --nodes starts, at consecutive ports from --port on")
    ] = 1
    coordinator: Annotated[
        Address | None, Option("cluster", ADDRESS, "where a router or a node reaches the coordinator")
    ] = None
    cluster_listen: Annotated[
        Address | None,
        Option("cluster", ADDRESS, "where a node hears routers, or the coordinator its members",
               note="a node without it listens at a free port of this machine"),
    ] = None  # fmt: skip
    node_name: Annotated[
        str | None,
        Option("cluster", TEXT, "the name of this node or router", note="by default host and port"),
    ] = None
    zone: Annotated[
        str | None, Option("cluster", TEXT, "copies of an adapter are spread over different zones")
    ] = None
    registry_file: Annotated[
        Path | None,
        Option(
            "cluster",
            FILE,
            "where the coordinator or a single server keeps its registry of adapters; none: in memory",
        ),
    ] = None
    slo_ttft_s: Annotated[
        float | None,
        Option("cluster", SECONDS, "within which a first token is to come; what cannot be is refused",
               note="in a cluster 2 by default; one server alone has no bound that is not given"),
    ] = None  # fmt: skip
    slo_tbt_s: Annotated[
        float | None,
        Option("cluster", SECONDS, "within which each later token is to come; prompts are read in smaller parts",
               note="in a cluster 0.1 by default; one server alone has no bound that is not given"),
    ] = None  # fmt: skip
    tenant_weights: Annotated[
        Mapping[str, float] | None,
        Option("cluster", WEIGHT, "how much a tenant has of what there is where all want more", "tenant-weight",
               many=True, note="a tenant is an API key, by the name that logs call it; others weigh 1"),
    ] = None  # fmt: skip
    profile: Annotated[
        Path | None,
        Option("cluster", FILE, "what steps cost, as scripts.profile_node measured it; the same for all members",
               note="by default one that is shipped, from which nodes learn how far they are"),
    ] = None  # fmt: skip
    policy: Annotated[
        PolicyName,
        Option(
            "cluster",
            one_of(PolicyName, "POLICY"),
            "how adapters are placed and requests routed; for comparisons",
        ),
    ] = "ours"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.is_alone:
            self._check_alone()
        if self.nodes is not None and self.role != "single":
            remedy = f"--nodes starts every role itself: leave out --role {self.role}"
            raise InvalidConfig("nodes", self.nodes, remedy)
        if self.role in ("router", "node") and self.coordinator is None:
            raise InvalidConfig("coordinator", None, f"--role {self.role} needs it: give HOST:PORT")
        if self.role in ("router", "node") and self.registry_file is not None:
            remedy = f"the coordinator keeps the catalogue: leave it out of --role {self.role}"
            raise InvalidConfig("registry_file", str(self.registry_file), remedy)
        if self.role == "coordinator" and self.cluster_listen is None:
            raise InvalidConfig("cluster_listen", None, "--role coordinator needs it: give HOST:PORT")

    @property
    def is_alone(self) -> bool:
        """Return whether this is a server without a cluster."""
        return self.role == "single" and self.nodes is None

    @property
    def node_range(self) -> NodeRange:
        """Return how many nodes to start at least and at most."""
        return NodeRange.of(self.nodes or 1)

    @property
    def has_slo(self) -> bool:
        """Return whether some latency is promised."""
        return not self.is_alone or self.slo_ttft_s is not None or self.slo_tbt_s is not None

    @property
    def slo(self) -> Slo:
        """Return the latencies that are promised, endless where none is."""
        default = Slo(math.inf, math.inf) if self.is_alone else _CLUSTER_SLO
        return Slo(self.slo_ttft_s or default.ttft_s, self.slo_tbt_s or default.tbt_s)

    def _check_alone(self) -> None:
        """Refuse what would do nothing for a server that is in no cluster."""
        honoured = {
            "registry_file",
            "tenant_weights",
            "slo_ttft_s",
            "slo_tbt_s",
            *(["profile"] if self.has_slo else []),
        }
        for option in options_of(ClusterConfig):
            value = getattr(self, option.field)
            if value != option.default and option.field not in honoured:
                remedy = "it does nothing without a cluster: give --nodes or --role too, or leave it out"
                raise InvalidConfig(option.key, option.shown(value), remedy)
