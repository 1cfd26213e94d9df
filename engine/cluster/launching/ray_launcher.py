"""Have Ray run a cluster: start it, tell how it does, give it more or fewer nodes, and end it.

Ray's actors outlive this process. What they were started by is asked of them, so any terminal may change the cluster.
Where the number of nodes is open, one of them has as many run as the coordinator wants: the scaler.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from engine.cluster.launching.member_lines import KINDS, SCALER, MemberLines
from engine.cluster.launching.ray_cluster import RayCluster
from engine.cluster.launching.ray_plan import Change, Service, change_to, refuse_secrets
from engine.cluster.launching.role_actor import ActorStatus
from engine.config.config import ServeConfig
from engine.config.launch_config import LaunchConfig
from engine.config.node_range import NodeRange
from engine.config.peer_config import trust
from engine.errors import InvalidConfig
from transport.errors import HelloRefused

_LOOK_S = 0.3
_WATCH_S = 2.0
_GRACE_S = 15.0  # beyond the time to drain
_FAILED = ("refused", "lost")
_ENDING = ("draining", "ended")
_NOTHING = "no service runs on this Ray cluster: --nodes N starts one"


def launch_on_ray(arguments: Sequence[str], config: ServeConfig) -> int:
    """Do what `config` asks of Ray; return the exit code. Raises InvalidConfig."""
    if not config.launch.commands:
        refuse_secrets(arguments, dict(os.environ), config)
    cluster = RayCluster(config.launch.ray_address)
    try:
        launcher = RayLauncher(cluster, config.launch.ray_wait_s, _say)
        if config.launch.status:
            return launcher.show()
        if config.launch.stop:
            return launcher.stop()
        if config.launch.scale is not None:
            return launcher.scale(config)
        return launcher.start(arguments, config)
    except KeyboardInterrupt:
        _say("interrupted: --launcher ray --status shows what runs")
        return 130
    finally:
        cluster.close()


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


class RayLauncher:
    """What an operator may ask of a service on Ray."""

    def __init__(self, cluster: RayCluster, wait_s: float, say: Callable[[str], None]) -> None:
        """Let Ray take `wait_s` to find room for nodes."""
        self._cluster, self._wait_s, self._say = cluster, wait_s, say

    def start(self, arguments: Sequence[str], config: ServeConfig) -> int:
        """Start a service, say where it is, and wait until it is stopped. Raises InvalidConfig."""
        cluster, asked = self._cluster, config.cluster.node_range
        nodes = asked.lowest
        if cluster.names():
            remedy = "a service runs on this Ray cluster: --scale N gives it other nodes, --stop ends it"
            raise InvalidConfig("nodes", nodes, remedy)
        service = self._service(arguments, config)
        change = change_to(nodes, (), cluster.groups(), service.spread)
        self._reserve(service, change, "nodes", nodes)
        others = ["coordinator", *(f"router-{at}" for at in range(service.lines.routers))]
        try:
            cluster.start(service, "coordinator", 0)
            for at in change.start:
                cluster.start(service, "node", at)
            for at in range(service.lines.routers):
                cluster.start(service, "router", at)
            if asked.is_open:
                self._start_scaler(service, asked, config.launch)
            ready = self._until_ready([*others, *(f"node-{at}" for at in change.start)])
            where = " and ".join(each.address for each in ready if each.name.startswith("router"))
            self._say(
                f"ready at {where}: {nodes} nodes on Ray; Ctrl-C leaves the service, --launcher ray --stop ends it"
            )
        except InvalidConfig:
            self._remove(cluster.names())
            cluster.release(cluster.groups())
            raise
        except KeyboardInterrupt:
            return self._leave()
        return self._stay()

    def show(self) -> int:
        """List the members; return 1 if there are none."""
        names = self._cluster.names()
        if not names:
            self._say(_NOTHING)
            return 1
        for line in table([self._cluster.status(name) for name in names]):
            self._say(line)
        return 0

    def stop(self) -> int:
        """Drain and end all: routers first, so that what runs is answered."""
        names = self._cluster.names()
        service = self._cluster.service()
        for kind in (SCALER, *KINDS):
            self._drain([name for name in names if name.startswith(kind)], service)
        self._cluster.release(self._cluster.groups())
        self._say(f"stopped: {len(names)} members have ended" if names else _NOTHING)
        return 0

    def scale(self, config: ServeConfig) -> int:
        """Have so many nodes run, or have their number follow the load from now on. Raises InvalidConfig."""
        asked = NodeRange.of(config.launch.scale or 1)
        service = self._cluster.service()
        if service is None:
            remedy = "its coordinator does not answer: try again" if self._cluster.names() else _NOTHING
            raise InvalidConfig("scale", config.launch.scale, remedy)
        self._drain([SCALER] if SCALER in self._cluster.names() else [], service)
        if asked.is_open:
            self._start_scaler(service, asked, config.launch)
            self._say(
                f"the number of nodes follows the load, within {asked}: --launcher ray --status shows it"
            )
        else:
            self.resize(service, asked.lowest, "scale")
        return 0

    def _start_scaler(self, service: Service, nodes: NodeRange, launch: LaunchConfig) -> None:
        """Have an actor keep the number of nodes within a range. Raises InvalidConfig where it cannot start."""
        self._cluster.start(service.scaled(nodes, launch, self._cluster.address), SCALER, 0)
        try:
            self._until_ready([SCALER])
        except InvalidConfig:
            self._remove([SCALER])
            raise

    def _stay(self) -> int:
        """Wait until the service is stopped."""
        try:
            while self._cluster.names():
                time.sleep(_WATCH_S)
        except KeyboardInterrupt:
            return self._leave()
        return 0

    def _leave(self) -> int:
        self._say("the service goes on: --launcher ray --status shows it, --stop ends it")
        return 0

    def resize(self, service: Service, nodes: int, option: str) -> None:
        """Have so many nodes run; what those left over run is finished first. Raises InvalidConfig.

        Nodes that another command has told to end, and has not removed, are removed first.
        """
        running = [self._cluster.status(f"node-{at}") for at in self._cluster.nodes()]
        self._drain([each.name for each in running if each.state in _ENDING], service)
        change = change_to(nodes, self._cluster.nodes(), self._cluster.groups(), service.spread)
        self._reserve(service, change, option, nodes)
        started = [f"node-{at}" for at in change.start]
        for at in change.start:
            self._cluster.start(service, "node", at)
        try:
            self._until_ready(started)
        except InvalidConfig:
            self._remove(started)
            self._cluster.release(change.reserve)
            raise
        self._drain([f"node-{at}" for at in change.drain], service)
        self._cluster.release(change.release)
        self._say(f"{nodes} nodes: {len(change.start)} started, {len(change.drain)} drained and ended")

    def _service(self, arguments: Sequence[str], config: ServeConfig) -> Service:
        address = self._cluster.head_address()
        try:
            trust(config.engine.peers).check_host(address.host)
        except HelloRefused as error:
            remedy = f"{error} (--peer-tls-ca, --peer-tls-cert, --peer-tls-key)"
            raise InvalidConfig("peer_plain", config.engine.peers.plain, remedy) from error
        has_gpus = config.engine.device != "cpu" and self._cluster.has_gpus()
        return Service(
            MemberLines.of(arguments, config, str(address)),
            str(Path.cwd()),
            config.drain_s,
            config.launch.ray_cpus,
            config.engine.tensor_parallel_size if has_gpus else 0,
            config.launch.ray_spread,
        )

    def _reserve(self, service: Service, change: Change, option: str, nodes: int) -> None:
        free = self._cluster.free()
        if not self._cluster.reserve(service, change.reserve, self._wait_s):
            each = ", ".join(f"{amount} {name}" for name, amount in service.bundle.items())
            apart = " on a machine of its own" if service.spread else ""
            remedy = (
                f"Ray had no room for {sum(group.size for group in change.reserve)} more within "
                f"{self._wait_s:g} s: each takes {each}{apart}, and free were {free}; give fewer, or add machines"
            )
            raise InvalidConfig(option, nodes, remedy)

    def _until_ready(self, names: Sequence[str]) -> list[ActorStatus]:
        """Wait until members are ready, and tell how they do. Raises InvalidConfig for one that can never be."""
        while True:
            found = [self._cluster.status(name) for name in names]
            for each in found:
                if each.state in _FAILED:
                    remedy = f"{each.name} cannot start: {each.last_line}"
                    raise InvalidConfig("launcher", "ray", remedy)
            if all(each.state == "ready" for each in found):
                return found
            time.sleep(_LOOK_S)

    def _drain(self, names: Sequence[str], service: Service | None) -> None:
        """Have members finish what they do, then remove them."""
        for name in names:
            self._cluster.end(name)
        deadline_s = time.monotonic() + (service.drain_s if service else 0.0) + _GRACE_S
        while time.monotonic() < deadline_s:
            if all(self._cluster.status(name).state in ("ended", "lost") for name in names):
                break
            time.sleep(_LOOK_S)
        self._remove(names)

    def _remove(self, names: Sequence[str]) -> None:
        for name in names:
            self._cluster.remove(name)


def table(members: Sequence[ActorStatus]) -> list[str]:
    """Return the lines of a table of members: role, actor, machine, address, state and why it is not ready."""
    rows = [("role", "actor", "machine", "address", "state")]
    for each in members:
        why = "" if each.state == "ready" or not each.last_line else f" ({each.last_line})"
        role = each.name.partition("-")[0]
        rows.append((role, each.name, each.machine or "-", each.address or "-", f"{each.state}{why}"))
    widths = [max(len(row[at]) for row in rows) for at in range(4)]
    return ["  ".join([*(row[at].ljust(widths[at]) for at in range(4)), row[4]]).rstrip() for row in rows]
