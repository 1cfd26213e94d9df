"""Show a coordinator to those who look after it: the cluster as it knows it, as records and as metrics."""

from engine.api.guard import RequestGuard
from engine.api.server.configured import access_rules, listen_at, request_log
from engine.api.server.listener import HttpServer, tls_of
from engine.api.status.status_app import status_app
from engine.catalogue.base import AdapterRecord, ClusterRecord, names_after
from engine.cluster.control.coordinator_server import CoordinatorServer
from engine.cluster.roles.coordinator_series import coordinator_series
from engine.config.config import ServeConfig
from engine.metrics.series import MetricSeries
from engine.metrics.snapshot import Standing
from engine.metrics.telemetry import Telemetry
from engine.tenant_watch import TenantWatch


class CoordinatorRecords:
    """ClusterRecords of a coordinator. Used on its event loop."""

    def __init__(self, server: CoordinatorServer) -> None:
        self._server = server

    async def records(self, after: str, limit: int) -> list[AdapterRecord]:
        """Describe the first `limit` names after `after`."""
        return self._server.status.adapters(names_after(self._server.catalogue.entries, after, limit))

    async def cluster(self) -> ClusterRecord:
        """Describe the cluster."""
        return self._server.status.cluster()


class ObservedCoordinator:
    """ObservedServer of a coordinator, which serves no model. Used on its event loop."""

    model_name = ""
    model_names: tuple[str, ...] = ()

    def __init__(self, server: CoordinatorServer, telemetry: Telemetry) -> None:
        self._server, self.telemetry = server, telemetry
        self.catalogue = CoordinatorRecords(server)

    def series(self) -> tuple[MetricSeries, ...]:
        """Tell the cluster of this moment."""
        return coordinator_series(self._server.status.cluster())

    def stats(self) -> Standing:
        """Tell why it leads no more, if so."""
        failure = self._server.failure
        return Standing(None if failure is None else str(failure))


class CoordinatorDoor:
    """A coordinator's HTTP socket: its health, metrics, cluster and page, by the keys that a router would ask for."""

    def __init__(self, observed: ObservedCoordinator, config: ServeConfig) -> None:
        """Listen nowhere yet. Raises InvalidConfig."""
        self._config, self._log = config, request_log(config, None)
        observed.telemetry.watch_lost_lines(self._log.lost)
        rules = access_rules(config)
        self._watch = TenantWatch(config, (rules,))
        app = status_app(observed, RequestGuard(rules, self._log), config.http, config.access.cors_origins)
        self._server = HttpServer(app, tls_of(config.access), config.http)

    async def open(self) -> str:
        """Listen, and return the URL. Raises InvalidConfig."""
        url = await listen_at(self._server, self._config)
        self._watch.start()
        return url

    async def close(self) -> None:
        """End all connections."""
        await self._server.close()
        await self._watch.close()
        self._log.close()
