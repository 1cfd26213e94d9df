"""Tell what a router knows of its cluster as metrics: sums over the nodes, and what it has sent, moved and refused."""

from collections.abc import Sequence

from engine.cluster.router.forwarding import Forwarding
from engine.cluster.view import ClusterView
from engine.live.live_outputs import LiveOutputs
from engine.metrics.series import AdapterRequests, MetricSeries, Refusals, gateway_series

_MOST_NODES = 256  # that are told by themselves


class RouterSeries:
    """The series of one router. Used on one event loop."""

    def __init__(
        self, view: ClusterView, forwarding: Forwarding, outputs: LiveOutputs, refusals: Refusals
    ) -> None:
        self._view, self._forwarding = view, forwarding
        self._outputs, self._refusals = outputs, refusals

    def collect(self, model: str, recent: Sequence[str]) -> tuple[MetricSeries, ...]:
        """Tell the series of this moment; of the placement, only that of the `recent` adapters."""
        return (
            *self._gateway(model, len(recent)),
            self._refusals.series(self._forwarding.counts.refused),
            *self._forwarded(),
            self._shares(recent),
            self._outputs.uses.series(),
        )

    def _gateway(self, model: str, most_names: int) -> tuple[MetricSeries, ...]:
        """Sum up what the nodes say of themselves."""
        router = self._forwarding.router
        heard = [load for node in self._forwarding.ready if (load := router.heard(node)) is not None]
        waiting = sum(load.waiting for load in heard)
        running = max(0, sum(load.requests for load in heard) - waiting)
        tokens = sum(load.kv_tokens for load in heard)
        used = sum(load.kv_used_tokens for load in heard) / tokens if tokens else 0.0
        seats = sum(int(load.seats) for load in heard if load.seats != float("inf"))
        catalogue = self._view.catalogue
        drawing, begun = (
            [name for name in each if name in catalogue] for each in self._outputs.names_by_state()
        )
        adapters = AdapterRequests(drawing, begun, seats)
        return gateway_series(model, running, waiting + router.waiting, used, adapters, max(1, most_names))

    def _forwarded(self) -> tuple[MetricSeries, ...]:
        counts = self._forwarding.counts
        sent = [((node,), float(count)) for node, count in sorted(counts.sent_to.items())[:_MOST_NODES]]
        plain: tuple[tuple[str, str, float], ...] = (
            ("requests_moved", "Requests that went on at another node.", counts.moved),
            ("streams_moved", "Sequences that went on at another node.", counts.streams_moved),
            ("replacements", "Times that the coordinator changed the placement.", self._view.replacements),
        )
        return (
            MetricSeries(
                "loraserve_requests_forwarded", "Requests sent, by node.", ("node",), sent, "counter"
            ),
            *(
                MetricSeries(f"loraserve_{name}", told, (), [((), float(count))], "counter")
                for name, told, count in plain
            ),
            MetricSeries(
                "loraserve_cluster_nodes", "Nodes that this router reaches.", (),
                [((), float(len(self._forwarding.ready)))],
            ),
            MetricSeries(
                "loraserve_cluster_nodes_wanted",
                "Nodes that there should be by the load; 0 where their number is fixed.", (),
                [((), float(self._view.nodes_wanted))],
            ),
        )  # fmt: skip

    def _shares(self, recent: Sequence[str]) -> MetricSeries:
        """Tell φ of the adapters that were used last."""
        entries = [entry for name in recent if (entry := self._view.catalogue.get(name)) is not None]
        shares = self._view.table.shares
        samples = [
            ((entry.name, str(entry.ref.rank), share.node), share.part)
            for entry in entries
            for share in shares.get(entry.ref, ())
        ]
        told = "The part of an adapter's traffic that the placement gives to a node."
        return MetricSeries("loraserve_adapter_share", told, ("adapter", "rank", "node"), samples)
