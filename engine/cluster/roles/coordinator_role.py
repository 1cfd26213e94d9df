"""Run the coordinator as a process of its own."""

import asyncio
import time
from collections.abc import Callable

from engine.catalogue.catalogue_file import CatalogueFile
from engine.cluster.control.coordinator_server import CoordinatorServer
from engine.cluster.roles.role_parts import costs_of, listen_error, security_of
from engine.cluster.size_call import size_service
from engine.cluster.trusted_channels import MemberServer
from engine.config.config import ServeConfig
from scheduler.cluster.policies import POLICIES
from transport.errors import HelloRefused


async def run_coordinator(config: ServeConfig, ready: Callable[[str], None], stop: asyncio.Event) -> None:
    """Lead until `stop` is set, or until another coordinator takes over.

    Raises InvalidConfig for an address or a catalogue that cannot be used, or what another leader's lead is told by.
    """
    cluster, security = config.cluster, security_of(config)
    assert cluster.cluster_listen is not None, "ClusterConfig demands it of a coordinator"
    costs = costs_of(config)
    make = POLICIES[cluster.policy].coordinator(costs.setting(cluster.routers))
    server = CoordinatorServer(make, CatalogueFile(cluster.registry_file, time.time()), costs.digest)
    server.on_failure(stop.set)
    members = MemberServer(security, [server.service(), size_service(server.coordinator.size)])
    await server.start()
    try:
        address = await members.start(cluster.cluster_listen)
        ready(str(address))
        await stop.wait()
    except (OSError, HelloRefused) as error:
        raise listen_error("cluster_listen", cluster.cluster_listen, error) from error
    finally:
        await server.close()
        await members.close()
    if server.failure is not None:
        raise server.failure
