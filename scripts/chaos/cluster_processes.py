"""Run the members of a cluster as processes, each started again when it ends, as an operator's supervisor does."""

import asyncio
import os
import secrets
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from engine.cluster.launching.kept_process import NODE_NICENESS, tethered
from engine.cluster.launching.member_lines import LOCAL, free_ports
from engine.config.peer_config import PEER_TOKEN_VARIABLE
from scripts.certificates import make_certificates
from scripts.chaos.network import Network

_PAUSE_S = 0.5  # before a member that has ended is started again
_END_S = 30.0
_COORDINATOR = "coordinator"


@dataclass(frozen=True, slots=True)
class ClusterPlan:
    """What runs: how many of each, where adapters lie, and what else every member is told."""

    nodes: int
    routers: int
    adapters: Path
    work: Path  # for certificates, the registry and logs
    options: tuple[str, ...] = ()
    owners: int | None = None  # the first so many nodes have the adapters' folder; None: all

    @property
    def names(self) -> tuple[str, ...]:
        """List the members; the coordinator is first."""
        nodes = (f"node-{at}" for at in range(self.nodes))
        return (_COORDINATOR, *nodes, *(f"router-{at}" for at in range(self.routers)))


class ClusterProcesses:
    """The members, kept running until told to stop. Used on one event loop."""

    def __init__(self, plan: ClusterPlan, network: Network | None) -> None:
        """Run each in its own namespace of `network`, or all on this machine's loopback."""
        self.plan, self.network = plan, network
        self.starts = dict.fromkeys(plan.names, 0)
        self._hosts = network.hosts if network else dict.fromkeys(plan.names, LOCAL)
        ports = iter(free_ports(LOCAL, 3 * len(plan.names)))
        self._ports = {name: (next(ports), next(ports), next(ports)) for name in plan.names}
        self._trust = self._trust_options()
        self._commands = {name: self._command(name) for name in plan.names}
        self._running: dict[str, asyncio.subprocess.Process] = {}
        self._watchers: list[asyncio.Task[None]] = []
        self._environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            PEER_TOKEN_VARIABLE: secrets.token_urlsafe(24),
        }

    def address(self, name: str) -> str:
        """Return where a member serves HTTP."""
        return f"http://{self._hosts[name]}:{self._ports[name][0]}"

    @property
    def routers(self) -> tuple[str, ...]:
        """List the routers."""
        return tuple(name for name in self.plan.names if name.startswith("router"))

    def start(self) -> None:
        """Begin to run all."""
        self._watchers = [asyncio.create_task(self._keep_running(name)) for name in self.plan.names]

    def pid(self, name: str) -> int | None:
        """Return a member's process, if it runs."""
        process = self._running.get(name)
        return process.pid if process is not None else None

    def send(self, name: str, number: signal.Signals) -> bool:
        """Send a signal to a member; tell whether it runs."""
        pid = self.pid(name)
        if pid is None:
            return False
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return False
        return True

    async def stop(self) -> None:
        """End all: routers first, so that what runs is answered; what does not end in time is killed."""
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        for kind in ("router", "node", _COORDINATOR):
            ending = [process for name, process in self._running.items() if name.startswith(kind)]
            for process in ending:
                with suppress(ProcessLookupError):
                    process.send_signal(signal.SIGCONT)
                    process.send_signal(signal.SIGTERM)
            if ending:
                waits = [asyncio.create_task(process.wait()) for process in ending]
                await asyncio.wait(waits, timeout=_END_S)
            for process in ending:
                with suppress(ProcessLookupError):
                    process.kill()
            await asyncio.gather(*(process.wait() for process in ending))

    async def _keep_running(self, name: str) -> None:
        inside = self.network.inside(name) if self.network else ()
        log = (self.plan.work / f"{name}.log").open("ab", buffering=0)
        with log:
            while True:
                niceness = NODE_NICENESS if name.startswith("node") else 0
                process = await asyncio.create_subprocess_exec(
                    *inside, *tethered(self._commands[name], niceness), env=self._environment, stdout=log, stderr=log,
                    start_new_session=True,
                )  # fmt: skip
                self._running[name] = process
                self.starts[name] += 1
                code = await process.wait()
                log.write(f"-- {name} ended with {code} at {time.time():.1f}\n".encode())
                del self._running[name]
                await asyncio.sleep(_PAUSE_S)

    def _command(self, name: str) -> tuple[str, ...]:
        plan, at = self.plan, f"{self._hosts[_COORDINATOR]}:{self._ports[_COORDINATOR][1]}"
        http, link, peers = self._ports[name]
        host = self._hosts[name]
        own = ("--host", host, "--port", str(http))
        shared = (sys.executable, "-m", "engine.serve", "--no-progress", *plan.options, *self._trust, *own)
        if name == _COORDINATOR:
            registry = str(plan.work / "registry.sqlite")
            lead = ("--role", "coordinator", "--cluster-listen", at, "--registry-file", registry)
            return (*shared, *lead, "--routers", str(plan.routers))
        member = ("--coordinator", at, "--node-name", name, "--dtype", "float32")
        if name.startswith("router"):
            return (*shared, "--role", "router", *member, "--routers", str(plan.routers))
        listen = ("--cluster-listen", f"{host}:{link}", "--peer-listen", f"{host}:{peers}")
        node = (*shared, "--role", "node", *member, *listen)
        has_folder = plan.owners is None or int(name.rpartition("-")[2]) < plan.owners
        return (*node, "--lora-dir", str(plan.adapters)) if has_folder else node

    def _trust_options(self) -> Sequence[str]:
        """Return what members trust each other by: certificates, where they have hosts of their own."""
        if self.network is None:
            return ("--peer-plain",)
        made = make_certificates(self.plan.work / "trust", sorted(set(self._hosts.values())))
        options = ("--peer-tls-ca", "--peer-tls-cert", "--peer-tls-key")
        return [word for pair in zip(options, made, strict=True) for word in pair]
