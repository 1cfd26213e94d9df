"""Start a whole cluster on this machine by one command: a coordinator, nodes and routers, each a process.

The first signal has all drain: routers first, which have nodes end what runs, then the nodes, then the coordinator. A
second ends them at once.
"""

import asyncio
import os
import secrets
import signal
from collections.abc import Sequence

from engine.cluster.launching.kept_process import KeptProcess, serve_command
from engine.cluster.launching.member_lines import KINDS, LOCAL, MemberLines, Part, free_ports
from engine.config.config import ServeConfig
from engine.config.peer_config import PEER_TOKEN_VARIABLE
from engine.metrics.log_queue import server_log

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def launch(arguments: Sequence[str], config: ServeConfig) -> int:
    """Run the cluster that `config` asks for until told to stop; return the exit code."""
    with server_log(config.log_level):
        return asyncio.run(_ClusterProcesses(arguments, config).run())


class _ClusterProcesses:
    """The processes, and whether they are to run."""

    def __init__(self, arguments: Sequence[str], config: ServeConfig) -> None:
        self._drain_s = config.drain_s
        cores = os.cpu_count() or 1
        threads = str(max(1, cores // (config.cluster.nodes or 1)))
        environment = {
            "OMP_NUM_THREADS": threads,
            PEER_TOKEN_VARIABLE: secrets.token_urlsafe(24),
            **os.environ,
        }
        parts = plan(arguments, config)
        self._kept = [KeptProcess(part.name, serve_command(part), environment) for part in parts]
        self._stopping = asyncio.Event()

    async def run(self) -> int:
        """Start all, watch them, and stop them when told to."""
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._stop)
        watchers = [asyncio.create_task(each.run()) for each in self._kept]
        try:
            await self._stopping.wait()
            for kind in KINDS:
                ending = [each for each in self._kept if each.name.startswith(kind)]
                await asyncio.gather(*(each.end(self._drain_s) for each in ending))
        finally:
            for watcher in watchers:
                watcher.cancel()
            await asyncio.gather(*watchers, return_exceptions=True)
            for each in self._kept:
                each.kill()
        return 0

    def _stop(self) -> None:
        for each in self._kept:
            if self._stopping.is_set():
                each.kill()
            else:
                each.start_no_more()
        self._stopping.set()


def plan(arguments: Sequence[str], config: ServeConfig) -> tuple[Part, ...]:
    """Return the processes of a cluster on this machine, each with a port that was free."""
    nodes = config.cluster.nodes or 1
    ports = iter(free_ports(LOCAL, 1 + 3 * nodes))
    lines = MemberLines.of(arguments, config, f"{LOCAL}:{next(ports)}")
    made = [
        lines.node(at, f"{LOCAL}:{next(ports)}", f"{LOCAL}:{next(ports)}", (LOCAL, next(ports)))
        for at in range(nodes)
    ]
    return (lines.coordinator_part(), *made, *(lines.router(at) for at in range(lines.routers)))
