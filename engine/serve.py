"""Serve an engine over HTTP, and over gRPC if asked, until told to stop: python -m engine.serve.

The first SIGTERM or SIGINT stops accepting, lets what runs finish for up to `drain_s` and exits with 0; a
second one ends the process at once. When the engine fails, or a process that computes along with it, the server stops
by itself, with 1, so that a supervisor starts it again.

A role is imported once it is known: only what computes imports torch, which takes seconds and hundreds of megabytes.
"""

import asyncio
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from engine.api.adapters import AdapterAdmin
from engine.api.admin.pushed_files import PushOptions
from engine.api.base import EngineClient
from engine.api.guard import RequestGuard
from engine.api.http import http_app
from engine.api.server.configured import access_rules, listen_at, request_log
from engine.api.server.listener import HttpServer, tls_of
from engine.api.usage_routes import UsageRoutes
from engine.base.model_card import base_folder
from engine.batches.batch_routes import BatchRoutes
from engine.catalogue.catalogue_file import CatalogueFile
from engine.cluster.launching.local_launcher import launch
from engine.cluster.launching.ray_launcher import launch_on_ray
from engine.config.command_line import serve_config
from engine.config.config import ServeConfig
from engine.errors import EngineStopped, InvalidConfig, WorkersFailed
from engine.metrics.log_queue import server_log
from engine.metrics.telemetry import Telemetry
from engine.metrics.tracing import tracing_of
from engine.rpc.rpc_guard import RpcGuard
from engine.rpc.rpc_server import RpcServer
from engine.server_process import freeze_objects, run_until, stopped_by_signals, tell_end, tell_ready
from engine.tenant_watch import TenantWatch
from engine.tenants.usage_log import UsageLog
from lora.errors import AdapterRefused
from lora.format.allowed_roots import AllowedRoots
from model.checkpoint_files import CheckpointError, weights_digest
from model.config import UnsupportedModel

if TYPE_CHECKING:
    from engine.assembly.assembly import Engine
    from engine.async_engine import AsyncEngine

USAGE_ERROR, FAILURE = 2, 1
_log = logging.getLogger(__name__)


class Membership(Protocol):
    """What a server has beside its client in a cluster; it lives as long as the client does."""

    async def start(self) -> None:
        """Join."""
        ...

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new and wait, at most `timeout_s`, for what others asked for."""
        ...

    async def close(self) -> None:
        """Leave."""
        ...


async def serve(
    client: EngineClient,
    config: ServeConfig,
    ready: Callable[[str], None],
    stop: asyncio.Event,
    membership: Membership | None = None,
) -> None:
    """Serve `client` until `stop` is set, then drain and close it.

    `ready` is called with the address once requests can be served. Raises InvalidConfig if the address is not free.
    """
    roots, log = lora_roots(config), request_log(config, client.telemetry.tracing)
    sources = config.engine.sources.allowed()
    client.telemetry.watch_lost_lines(log.lost)
    rules, admin = access_rules(config), AdapterAdmin(client, roots, sources)
    watch = TenantWatch(config, (rules, client.accounts))
    limits = config.engine.sources
    push = PushOptions(config.lora_push_dir, limits.most_bytes, limits.timeout_s)
    batches, kept = _batches(client, config), config.tenants
    usage = UsageLog.open(client.usage, kept.usage_file, kept.usage_days)
    more = [*([batches] if batches else []), *([UsageRoutes(usage)] if usage else [])]
    guarded = RequestGuard(rules, log)
    app = http_app(client, admin, guarded, config.access.cors_origins, config.http, more, push)
    server = HttpServer(app, tls_of(config.access), config.http)
    guard = RpcGuard(rules, log, config.http.write_timeout_s)
    rpc = RpcServer(client, admin, guard, config, stop.set)
    await client.start()
    try:
        if membership is not None:
            await membership.start()
        if batches is not None:
            await batches.start()
        address = await listen_at(server, config)
        if config.grpc_port is not None:
            address += f" and {await rpc.listen(config.host, config.grpc_port)}"
        watch.start()
        if usage is not None:
            usage.start()
        await run_until(stop, lambda: ready(address), lambda: client.stats().trouble)
        await rpc.stop_serving()
        await server.stop_listening()
        if batches is not None:
            await batches.close()
        if membership is not None:
            await membership.drain(config.drain_s)
        await client.drain(config.drain_s)
    finally:
        if batches is not None:
            await batches.close()
        if membership is not None:
            await membership.close()
        await client.close()
        await rpc.close()
        await server.close()
        await watch.close()
        if usage is not None:
            await usage.close()
        log.close()


def _batches(client: EngineClient, config: ServeConfig) -> BatchRoutes | None:
    if config.batches.batch_dir is None:
        return None
    return BatchRoutes(client, config.batches, config.http.body_timeout_s)


def lora_roots(config: ServeConfig) -> tuple[Path, ...]:
    """Return the folders that clients may load adapters from."""
    roots = config.lora_roots or ((config.engine.lora_dir,) if config.engine.lora_dir else ())
    return roots if config.lora_push_dir is None else (*roots, config.lora_push_dir)


def registry_file(config: ServeConfig) -> CatalogueFile | None:
    """Open the file that a single server keeps its registry of adapters in, if one is named. Raises InvalidConfig."""
    path = config.cluster.registry_file
    return None if path is None else CatalogueFile(path, time.time())


def _run_engine(config: ServeConfig, telemetry: Telemetry) -> None:
    from engine.assembly.assembly import assemble  # noqa: PLC0415 - imports torch
    from engine.async_engine import AsyncEngine  # noqa: PLC0415 - imports torch
    from engine.cluster.roles.single_role import keep_in_time  # noqa: PLC0415 - imports torch

    file = None if config.cluster.role == "node" else registry_file(config)
    engine = assemble(config.engine)
    roots = AllowedRoots.below(lora_roots(config))
    node = AsyncEngine(engine, telemetry, config.max_waiting, file, roots, config.engine.max_num_seqs)
    if config.cluster.is_alone:  # in a cluster a router takes care of turns
        engine.turns.start()
        engine.turns.weigh(config.cluster.tenant_weights or {})
    if config.cluster.is_alone and config.cluster.has_slo:
        keep_in_time(config, engine, node)
    asyncio.run(_run(node, engine, config))


async def _run(node: "AsyncEngine", engine: "Engine", config: ServeConfig) -> None:
    workers, membership = engine.workers, None
    if config.cluster.role == "node":
        from engine.cluster.roles.node_role import NodeRole  # noqa: PLC0415 - imports torch

        weights = weights_digest(base_folder(config.engine))
        membership = NodeRole(config, engine, node, weights)

    def announce(address: str) -> None:
        told = f"ready at {address}: {node.model_name} with {len(node.adapters())} adapters\n"
        if node.peer_address is not None:
            free = (
                ""
                if config.engine.peers.listen
                else " (a free port of this machine: --peer-listen names one)"
            )
            told += f"peers may pull adapters at {node.peer_address}{free}\n"
        tell_ready(told)

    stop, loop = stopped_by_signals(), asyncio.get_running_loop()
    node.on_failure(stop.set)
    if workers is not None:
        workers.on_failure(lambda: loop.call_soon_threadsafe(stop.set))
    freeze_objects()
    await serve(node, config, announce, stop, membership)
    failure = node.failure or (workers.failure if workers is not None else None)
    if failure is not None:
        raise failure


async def _run_router(config: ServeConfig, telemetry: Telemetry) -> None:
    from engine.cluster.roles.router_role import RouterRole  # noqa: PLC0415 - imports transformers

    role = RouterRole(config, telemetry)

    def announce(address: str) -> None:
        tell_ready(f"router ready at {address}: {role.client.model_name}\n")

    freeze_objects()
    await serve(role.client, config, announce, stopped_by_signals(), role)


async def _run_coordinator(config: ServeConfig, telemetry: Telemetry) -> None:
    from engine.cluster.roles.coordinator_role import run_coordinator  # noqa: PLC0415 - imports what places adapters

    def announce(address: str) -> None:
        freeze_objects()
        tell_ready(f"coordinator ready at {address}\n")

    await run_coordinator(config, telemetry, announce, stopped_by_signals())


def _serve_role(config: ServeConfig) -> None:
    """Serve as what the configuration says, until told to stop."""
    with server_log(config.log_level) as lines:
        tracing = tracing_of(config)
        telemetry = Telemetry(config.metrics_adapters, tracing)
        telemetry.watch_lost_lines(lambda: {"server": lines.lost})
        try:
            match config.cluster.role:
                case "coordinator":
                    asyncio.run(_run_coordinator(config, telemetry))
                case "router":
                    asyncio.run(_run_router(config, telemetry))
                case _:
                    _run_engine(config, telemetry)
        finally:
            if tracing is not None:
                tracing.close()


def main(arguments: Sequence[str]) -> int:
    """Serve until told to stop, and return the process's exit code."""
    try:
        config = serve_config(arguments, os.environ)
        if config.launch.launcher == "ray":
            return launch_on_ray(arguments, config)
        if config.cluster.nodes is not None:
            return launch(arguments, config)
        _serve_role(config)
    except (InvalidConfig, CheckpointError, UnsupportedModel, AdapterRefused) as error:
        tell_end(error)
        return USAGE_ERROR
    except (EngineStopped, WorkersFailed) as error:
        tell_end(error)
        return FAILURE
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
