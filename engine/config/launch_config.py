"""Hold what an operator may say of who starts a cluster's members: this command, or Ray on the machines it has."""

from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Literal

from engine.config.cluster_config import ClusterConfig
from engine.config.node_range import NODES, NodeRange, Nodes
from engine.config.option import Option, check_fields, options_of
from engine.config.option_types import ADDRESS, COUNT, FLAG, SECONDS, one_of
from engine.errors import InvalidConfig
from transport.base import Address

LauncherName = Literal["local", "ray"]
COMMANDS = ("status", "stop", "scale")
FOR_START = ("ray_spread", "ray_cpus", "ray_wait_s")
FOR_RANGE = ("grow_after_s", "shrink_after_s")


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """Who starts the members that `--nodes` asks for, and what is asked of members that Ray has started."""

    _: KW_ONLY
    launcher: Annotated[
        LauncherName,
        Option("launching", one_of(LauncherName, "LAUNCHER"), "who starts the members that --nodes asks for",
               note="ray needs the extra of that name"),
    ] = "local"  # fmt: skip
    ray_address: Annotated[
        Address | None,
        Option("launching", ADDRESS, "where the Ray cluster is", note="by default that of this machine"),
    ] = None
    ray_spread: Annotated[
        bool, Option("launching", FLAG, "every node on a machine of its own, or none is started")
    ] = False
    ray_cpus: Annotated[int, Option("launching", COUNT, "processors that Ray sets aside for each node")] = 1
    ray_wait_s: Annotated[
        float, Option("launching", SECONDS, "how long Ray may take to find room for new nodes")
    ] = 60.0
    status: Annotated[bool, Option("launching", FLAG, "list the members that Ray runs")] = False
    stop: Annotated[bool, Option("launching", FLAG, "drain and end the members that Ray runs")] = False
    scale: Annotated[
        Nodes | None,
        Option("launching", NODES, "have Ray run so many nodes; those left over are drained",
               note="with MIN:MAX their number follows the load from then on"),
    ] = None  # fmt: skip
    grow_after_s: Annotated[
        float,
        Option(
            "launching", SECONDS, "with MIN:MAX nodes, how long more must be needed before one is started"
        ),
    ] = 10.0
    shrink_after_s: Annotated[
        float,
        Option("launching", SECONDS, "with MIN:MAX nodes, how long one fewer must do before one is drained"),
    ] = 300.0

    def __post_init__(self) -> None:
        check_fields(self)
        given = [each for each in options_of(LaunchConfig) if getattr(self, each.field) != each.default]
        far = [each for each in given if each.field not in FOR_RANGE]
        if self.launcher == "local" and far:
            remedy = "it does nothing without --launcher ray: give that too, or leave it out"
            raise InvalidConfig(far[0].key, far[0].shown(getattr(self, far[0].field)), remedy)
        for each in given if self.commands else ():
            if each.field in FOR_START and not (each.field == "ray_wait_s" and self.scale):
                remedy = f"it is told when nodes start: leave it out beside --{self.commands[0]}"
                raise InvalidConfig(each.key, getattr(self, each.field), remedy)
        if len(self.commands) > 1:
            remedy = f"--{self.commands[0]} is given too: ask for one thing at a time"
            raise InvalidConfig(self.commands[1], getattr(self, self.commands[1]), remedy)

    @property
    def commands(self) -> tuple[str, ...]:
        """Return what is asked of members that run already."""
        return tuple(each for each in COMMANDS if getattr(self, each))

    def check_cluster(self, cluster: ClusterConfig) -> None:
        """Raise InvalidConfig for what makes no sense beside what is said of the cluster."""
        asked = cluster.nodes if self.scale is None else self.scale
        for each in options_of(LaunchConfig) if not (asked and NodeRange.of(asked).is_open) else ():
            if each.field in FOR_RANGE and getattr(self, each.field) != each.default:
                remedy = "the number of nodes is fixed: give --nodes MIN:MAX, or leave it out"
                raise InvalidConfig(each.key, getattr(self, each.field), remedy)
        if self.launcher == "local":
            return
        if cluster.role != "single":
            remedy = f"a launcher starts every role itself: leave out --role {cluster.role}"
            raise InvalidConfig("launcher", self.launcher, remedy)
        if self.commands and cluster.nodes is not None:
            remedy = f"--{self.commands[0]} is asked of members that run already: leave --nodes out"
            raise InvalidConfig("nodes", cluster.nodes, remedy)
        if not self.commands and cluster.nodes is None:
            remedy = "--launcher ray needs it: give a number, or one of --status, --stop and --scale N"
            raise InvalidConfig("nodes", None, remedy)
