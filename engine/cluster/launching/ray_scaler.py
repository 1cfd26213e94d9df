"""Keep the number of a service's nodes on Ray as the coordinator wants it.

An actor of Ray keeps this process, as it keeps members, so it outlives whoever started the service. SIGTERM ends it
once what it has begun is done.
"""

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType

from engine.cluster.launching.ray_cluster import RayCluster
from engine.cluster.launching.ray_launcher import RayLauncher
from engine.cluster.launching.ray_plan import Service
from engine.cluster.size_call import SizeAsk, ask_size
from engine.config.command_line import serve_config
from engine.config.config import ServeConfig
from engine.config.node_range import NodeRange
from engine.config.peer_config import trust
from engine.errors import InvalidConfig
from engine.server_process import tell_end, tell_ready

_WATCH_S = 2.0
_USAGE_ERROR = 2


class RayScaler:
    """Has as many nodes run as the coordinator wants; where Ray has no room yet it asks again later."""

    def __init__(self, cluster: RayCluster, config: ServeConfig) -> None:
        """Change nothing yet. Raises InvalidConfig."""
        self.nodes = NodeRange.of(config.launch.scale or 1)
        self._cluster, self._security = cluster, trust(config.engine.peers)
        self._launcher = RayLauncher(cluster, config.launch.ray_wait_s, _say)
        self._ask, self._lacks_room = SizeAsk.of(self.nodes, config.launch), False

    def run(self, stopping: threading.Event) -> None:
        """Look again and again until told to stop."""
        try:
            while not stopping.wait(_WATCH_S):
                service = self._cluster.service()
                if service is not None:
                    self._follow(service)
        finally:
            self._give_up_room()

    def _follow(self, service: Service) -> None:
        running = len(self._cluster.nodes())
        ask = self._ask.with_running(running)
        told = asyncio.run(ask_size(service.lines.coordinator, self._security, ask))
        if told is None or told.wanted == running or not running:
            return
        _say(f"{told.wanted} nodes are wanted and {running} run: {told.reason}")
        if told.wanted > running:
            self._cluster.ask_for_room([service.bundle] * told.wanted)
            self._lacks_room = True
        try:
            self._launcher.resize(service, told.wanted, "nodes")
        except InvalidConfig as error:
            _say(f"{error}; it is tried again")
        else:
            self._give_up_room()

    def _give_up_room(self) -> None:
        """Ask Ray for no more machines: those that have nodes stay."""
        if self._lacks_room:
            self._cluster.ask_for_room([])
            self._lacks_room = False


def _say(line: str) -> None:
    tell_ready(f"{line}\n")


def main(arguments: Sequence[str]) -> int:
    """Keep the number of nodes until told to stop; return the exit code."""
    stopping = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        stopping.set()

    signal.signal(signal.SIGTERM, stop)
    try:
        config = serve_config(arguments, os.environ)
        cluster = RayCluster(config.launch.ray_address)
        try:
            scaler = RayScaler(cluster, config)
            _say(f"scaler ready at {scaler.nodes}")
            scaler.run(stopping)
        finally:
            cluster.close()
    except InvalidConfig as error:
        tell_end(error)
        return _USAGE_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
