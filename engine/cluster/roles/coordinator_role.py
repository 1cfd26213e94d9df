"""Run the coordinator as a process of its own."""

import asyncio
import time
from collections.abc import Callable

from engine.catalogue.catalogue_file import CatalogueFile
from engine.cluster.control.coordinator_server import CoordinatorServer
from engine.cluster.roles.observed_coordinator import CoordinatorDoor, ObservedCoordinator
from engine.cluster.roles.role_parts import costs_of, listen_error, security_of
from engine.cluster.size_call import size_service
from engine.cluster.trusted_channels import MemberServer
from engine.config.config import ServeConfig
from engine.metrics.telemetry import Telemetry
from scheduler.cluster.policies import POLICIES
from transport.errors import HelloRefused


async def run_coordinator(
    config: ServeConfig, telemetry: Telemetry, ready: Callable[[str], None], stop: asyncio.Event
) -> None:
    """Lead until `stop` is set, or until another coordinator takes over; show the cluster over HTTP meanwhile.

    `ready` is called with the addresses once members and HTTP clients may connect.

    Raises InvalidConfig for an address or a catalogue that cannot be used, or what another leader's lead is told by.
    """
    cluster, security = config.cluster, security_of(config)
    assert cluster.cluster_listen is not None, "ClusterConfig demands it of a coordinator"
    costs = costs_of(config)
    make = POLICIES[cluster.policy].coordinator(costs.setting(cluster.routers))
    server = CoordinatorServer(make, CatalogueFile(cluster.registry_file, time.time()), costs.digest)
    server.on_failure(stop.set)
    members = MemberServer(security, [server.service(), size_service(server.coordinator.size)])
    door = CoordinatorDoor(ObservedCoordinator(server, telemetry), config)
    await server.start()
    try:
        url = await door.open()
        try:
            address = await members.start(cluster.cluster_listen)
        except (OSError, HelloRefused) as error:
            raise listen_error("cluster_listen", cluster.cluster_listen, error) from error
        ready(f"{address} and {url}")
        await stop.wait()
    finally:
        await door.close()
        await server.close()
        await members.close()
    if server.failure is not None:
        raise server.failure
