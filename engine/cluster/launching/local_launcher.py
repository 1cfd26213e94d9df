"""Start a whole cluster on this machine by one command: a coordinator, nodes and routers, each a process.

The first signal has all drain: routers first, which have nodes end what runs, then the nodes, then the coordinator. A
second ends them at once.
"""

import asyncio
import os
import secrets
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from engine.cluster.launching.cluster_processes import ClusterProcesses
from engine.cluster.launching.kept_process import NODE_NICENESS, KeptProcess, serve_command
from engine.cluster.launching.member_lines import LOCAL, MemberLines, Part, free_ports
from engine.cluster.size_call import SizeAsk, ask_size
from engine.config.config import ServeConfig
from engine.config.peer_config import PEER_TOKEN_VARIABLE, PeerConfig, trust
from engine.metrics.log_queue import server_log
from transport.base import Address
from transport.control.security import Security

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_NODE_PORTS = 3  # for routers, for peers and for HTTP


def launch(arguments: Sequence[str], config: ServeConfig) -> int:
    """Run the cluster that `config` asks for until told to stop; return the exit code."""
    with server_log(config.log_level):
        return asyncio.run(_run(arguments, config))


async def _run(arguments: Sequence[str], config: ServeConfig) -> int:
    nodes = config.cluster.node_range
    threads = str(max(1, (os.cpu_count() or 1) // nodes.highest))
    token = secrets.token_urlsafe(24)
    environment = {"OMP_NUM_THREADS": threads, PEER_TOKEN_VARIABLE: token, **os.environ}
    first = plan(arguments, config)
    lines = first.lines

    def keep(part: Part) -> KeptProcess:
        niceness = NODE_NICENESS if part.name.startswith("node") else 0
        return KeptProcess(part.name, serve_command(part), environment, niceness=niceness)

    def another(at: int) -> KeptProcess:
        return keep(_node(lines, at, free_ports(LOCAL, _NODE_PORTS)))

    cluster = ClusterProcesses([keep(part) for part in first.parts], another, config.drain_s)
    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, cluster.stop)
    if not nodes.is_open:
        return await cluster.run()
    ask = SizeAsk.of(nodes, config.launch)
    security = _security(config.engine.peers, environment)
    return await cluster.run(lambda running: ask_size(lines.coordinator, security, ask.with_running(running)))


@dataclass(frozen=True, slots=True)
class LocalPlan:
    """The members that a cluster on this machine begins with, and what those to come are told."""

    lines: MemberLines
    parts: tuple[Part, ...]


def plan(arguments: Sequence[str], config: ServeConfig) -> LocalPlan:
    """Return the members of a cluster on this machine, each with ports that were free."""
    nodes, each = config.cluster.node_range.lowest, _NODE_PORTS
    coordinator, http, *ports = free_ports(LOCAL, 2 + each * nodes)
    lines = MemberLines.of(arguments, config, f"{LOCAL}:{coordinator}")
    made = [_node(lines, at, ports[each * at : each * (at + 1)]) for at in range(nodes)]
    routers = (lines.router(at) for at in range(lines.routers))
    return LocalPlan(lines, (lines.coordinator_part((LOCAL, http)), *made, *routers))


def _node(lines: MemberLines, at: int, ports: Sequence[int]) -> Part:
    routers, peers, http = ports
    return lines.node(at, f"{LOCAL}:{routers}", f"{LOCAL}:{peers}", (LOCAL, http))


def _security(peers: PeerConfig, environment: Mapping[str, str]) -> Security:
    """Return what members here demand of each other. Raises InvalidConfig."""
    listen, plain = peers.listen or Address(LOCAL, 0), peers.tls_cert is None
    token = None if peers.token_file else environment[PEER_TOKEN_VARIABLE]
    return trust(replace(peers, listen=listen, plain=plain, token=token))
