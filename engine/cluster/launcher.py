"""Start a whole cluster on this machine by one command: a coordinator, nodes and routers, each a process.

A process that ends is started again, after a pause that grows while it keeps ending. The first signal has all drain:
routers first, which have nodes end what runs, then the nodes, then the coordinator. A second ends them at once.
"""

import asyncio
import logging
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from engine.config.config import ServeConfig
from engine.config.peer_config import PEER_TOKEN_VARIABLE
from engine.metrics.log_queue import server_log

_LEAST_PAUSE_S, _MOST_PAUSE_S = 0.5, 15.0
_STEADY_S = 30.0  # a process that ran so long is started again at once
_GRACE_S = 10.0  # beyond the time to drain
_LOCAL = "127.0.0.1"
_OWN_OPTIONS = {
    "--nodes": 1,
    "--routers": 1,
    "--port": 1,
    "--host": 1,
    "--registry-file": 1,
    "--batch-dir": 1,
    "--grpc-port": 1,
}
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Part:
    """One process of the cluster: its name and its command line."""

    name: str
    arguments: tuple[str, ...]


def launch(arguments: Sequence[str], config: ServeConfig) -> int:
    """Run the cluster that `config` asks for until told to stop; return the exit code."""
    with server_log(config.log_level):
        return asyncio.run(_ClusterProcesses(arguments, config).run())


class _ClusterProcesses:
    """The processes, and whether they are to run."""

    def __init__(self, arguments: Sequence[str], config: ServeConfig) -> None:
        self._parts = plan(arguments, config)
        self._drain_s, self._config = config.drain_s, config
        cores = os.cpu_count() or 1
        threads = str(max(1, cores // (config.cluster.nodes or 1)))
        self._environment = {
            "OMP_NUM_THREADS": threads,
            PEER_TOKEN_VARIABLE: secrets.token_urlsafe(24),
            **os.environ,
        }
        self._stopping = asyncio.Event()
        self._running: dict[str, asyncio.subprocess.Process] = {}

    async def run(self) -> int:
        """Start all, watch them, and stop them when told to."""
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._stop)
        watchers = [asyncio.create_task(self._keep_running(part)) for part in self._parts]
        try:
            await self._stopping.wait()
            for kind in ("router", "node", "coordinator"):
                await self._end([name for name in self._running if name.startswith(kind)])
        finally:
            for watcher in watchers:
                watcher.cancel()
            await asyncio.gather(*watchers, return_exceptions=True)
            for process in self._running.values():
                _signal(process, signal.SIGKILL)
        return 0

    def _stop(self) -> None:
        if self._stopping.is_set():
            for process in self._running.values():
                _signal(process, signal.SIGKILL)
        self._stopping.set()

    async def _keep_running(self, part: Part) -> None:
        pause_s = _LEAST_PAUSE_S
        while not self._stopping.is_set():
            began_s = time.monotonic()
            command = (sys.executable, "-m", "engine.serve", *part.arguments)
            process = await asyncio.create_subprocess_exec(
                *command, env=self._environment, start_new_session=True
            )
            self._running[part.name] = process
            code = await process.wait()
            self._running.pop(part.name, None)
            if self._stopping.is_set():
                return
            pause_s = (
                _LEAST_PAUSE_S if time.monotonic() - began_s > _STEADY_S else min(_MOST_PAUSE_S, 2 * pause_s)
            )
            _log.warning("%s has ended with %d: it is started again in %.1f s", part.name, code, pause_s)
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._stopping.wait()

    async def _end(self, names: Sequence[str]) -> None:
        """Have these processes drain, and end those that do not in time."""
        processes = [self._running[name] for name in names if name in self._running]
        for process in processes:
            _signal(process, signal.SIGTERM)
        waits = [asyncio.create_task(process.wait()) for process in processes]
        if waits:
            _, late = await asyncio.wait(waits, timeout=self._drain_s + _GRACE_S)
            if late:
                for process in processes:
                    _signal(process, signal.SIGKILL)


def plan(arguments: Sequence[str], config: ServeConfig) -> tuple[Part, ...]:
    """Return the processes of a cluster on this machine, each with a port that was free."""
    nodes, routers = config.cluster.nodes or 1, config.cluster.routers
    shared = _without(arguments, _OWN_OPTIONS)
    ports = iter(_free_ports(1 + 3 * nodes))
    coordinator = f"{_LOCAL}:{next(ports)}"
    trust = ("--peer-plain",) if config.engine.peers.tls_cert is None else ()
    registry, batches = config.cluster.registry_file, config.batches.batch_dir
    parts = [
        Part(
            "coordinator",
            (*shared, *trust, "--role", "coordinator", "--cluster-listen", coordinator, "--routers", str(routers),
             *(("--registry-file", str(registry)) if registry else ())),
        )
    ]  # fmt: skip
    # Nodes may find the option in a file or the environment: what they are told here wins.
    any_grpc = () if config.grpc_port is None else ("--grpc-port", "0")
    for at in range(nodes):
        listen, peers, port = (f"{_LOCAL}:{next(ports)}" for _ in range(3))
        parts.append(
            Part(
                f"node-{at}",
                (*shared, *trust, "--role", "node", "--host", _LOCAL, "--coordinator", coordinator,
                 "--cluster-listen", listen,
                 "--peer-listen", peers, "--node-name", f"node-{at}", "--port", port.rpartition(":")[2],
                 *any_grpc),
            )
        )  # fmt: skip
    for at in range(routers):
        port = str(config.port + at) if config.port else "0"
        rpc = (
            ()
            if config.grpc_port is None
            else ("--grpc-port", str(config.grpc_port and config.grpc_port + at))
        )
        parts.append(
            Part(
                f"router-{at}",
                (*shared, *trust, "--role", "router", "--coordinator", coordinator, "--host", config.host,
                 "--routers", str(routers), "--node-name", f"router-{at}",
                 "--port", port, *rpc, *(("--batch-dir", str(batches)) if batches else ())),
            )
        )  # fmt: skip
    return tuple(parts)


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


def _free_ports(count: int) -> list[int]:
    """Return ports of this machine that nobody listens at now, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind((_LOCAL, 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        process.send_signal(number)
