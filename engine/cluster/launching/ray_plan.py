"""Decide which nodes Ray runs and where it sets room aside for them: plain values, which know nothing of Ray.

Nodes are numbered from 0 on. A group is room that Ray sets aside, and gives back, at once: its placement group.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from engine.cluster.launching.member_lines import MemberLines, Part
from engine.config.access_config import AccessConfig
from engine.config.config import ServeConfig
from engine.config.launch_config import LaunchConfig
from engine.config.node_range import NodeRange
from engine.config.option import options_of
from engine.config.peer_config import PeerConfig
from engine.errors import InvalidConfig
from transport.control.security import is_loopback

_GROUP_PREFIX = "loraserve-nodes-"
_SIGNED_URL = re.compile(r"://[^/?#]*@|://.*\?")


@dataclass(frozen=True, slots=True)
class Service:
    """What every member on Ray is started by, on whichever machine; no secret is in it.

    Relative paths of `lines` start at `folder`. A node takes so many processors and GPUs; with `spread` it shares its
    machine with no other node. `scaling` is what a scaler is told.
    """

    lines: MemberLines
    folder: str
    drain_s: float
    cpus: int
    gpus: int
    spread: bool
    scaling: tuple[str, ...] = ()

    @property
    def bundle(self) -> dict[str, int]:
        """Return what Ray sets aside for a node."""
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})

    def part(self, kind: str, at: int, machine: str) -> Part:
        """Return a member's process on a machine that others reach by that address. Nodes take any free ports."""
        match kind:
            case "coordinator":
                return self.lines.coordinator_part((self._http_host(machine), 0))
            case "router":
                return self.lines.router(at)
            case "scaler":
                return self.lines.scaler(self.scaling)
            case _:
                free = f"[{machine}]:0" if ":" in machine else f"{machine}:0"
                return self.lines.node(at, free, free, (self._http_host(machine), 0))

    def scaled(self, nodes: NodeRange, launch: LaunchConfig, ray_address: str) -> "Service":
        """Return the same service for a scaler that keeps the number of nodes within a range."""
        patience = {
            "--ray-wait-s": launch.ray_wait_s, "--grow-after-s": launch.grow_after_s,
            "--shrink-after-s": launch.shrink_after_s,
        }  # fmt: skip
        told = [word for option, value in patience.items() for word in (option, str(value))]
        return replace(self, scaling=("--ray-address", ray_address, "--scale", repr(nodes), *told))

    def _http_host(self, machine: str) -> str:
        """Return where a node or the coordinator serves HTTP: to other machines only if routers do."""
        return self.lines.host if is_loopback(self.lines.host) else machine


@dataclass(frozen=True, slots=True, order=True)
class Group:
    """Room for `size` nodes, of which `first` is the lowest."""

    first: int
    size: int

    @property
    def name(self) -> str:
        """Return what Ray calls it."""
        return f"{_GROUP_PREFIX}{self.first}-{self.size}"

    @property
    def nodes(self) -> range:
        """Return the numbers of its nodes."""
        return range(self.first, self.first + self.size)

    @classmethod
    def named(cls, name: str) -> "Group | None":
        """Return the group of that name, or None for something else of Ray's."""
        numbers = name.removeprefix(_GROUP_PREFIX).split("-")
        if not name.startswith(_GROUP_PREFIX) or len(numbers) != 2 or not all(map(str.isdecimal, numbers)):
            return None
        return cls(int(numbers[0]), int(numbers[1]))


@dataclass(frozen=True, slots=True)
class Change:
    """What is to be done in this order: set groups aside, start nodes, drain and remove nodes, give groups back."""

    reserve: tuple[Group, ...] = ()
    start: tuple[int, ...] = ()
    drain: tuple[int, ...] = ()
    release: tuple[Group, ...] = ()


def change_to(wanted: int, running: Sequence[int], groups: Sequence[Group], spread: bool) -> Change:
    """Return what makes nodes 0 to `wanted` - 1 run, and no others.

    Nodes that are spread come in one group, as only within one does Ray keep them apart. It is given back whole, once
    none of its nodes is left.
    """
    start = tuple(at for at in range(wanted) if at not in running)
    have = {at for group in groups for at in group.nodes}
    lacking = [at for at in start if at not in have]
    sizes = [(lacking[0], len(lacking))] if spread and lacking else [(at, 1) for at in lacking]
    reserve = tuple(Group(*each) for each in sizes)
    drain = tuple(sorted((at for at in running if at >= wanted), reverse=True))
    return Change(reserve, start, drain, tuple(group for group in sorted(groups) if group.first >= wanted))


def group_of(at: int, groups: Sequence[Group]) -> Group:
    """Return the group that has room for a node."""
    return next(group for group in groups if at in group.nodes)


def refuse_secrets(arguments: Sequence[str], environ: dict[str, str], config: ServeConfig) -> None:
    """Raise InvalidConfig for a key or token that is given otherwise than by a file: Ray would tell it to everybody.

    Members on other machines do not see this process's environment, and a command line is seen by all who look.
    """
    if any(_SIGNED_URL.search(each) for each in arguments):
        remedy = (
            "a URL with a query or a password may be a secret, which Ray would tell: write it in --config"
        )
        raise InvalidConfig("lora", "(hidden)", remedy)
    written = {each.partition("=")[0] for each in arguments}
    for owner in (AccessConfig, PeerConfig):
        for option in options_of(owner):
            if not option.type.secret or (option.field == "token" and config.engine.peers.token_file):
                continue
            if environ.get(option.variable) or f"--{option.name}" in written:
                file = "peer-token-file" if owner is PeerConfig else f"{option.name}-file"
                remedy = f"members on other machines get secrets by files only: give --{file}"
                raise InvalidConfig(option.key, "(hidden)", remedy)
