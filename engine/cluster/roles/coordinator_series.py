"""Tell what the coordinator knows of its cluster as metrics: its members, the placement, and each node's part in it."""

from collections.abc import Callable, Sequence

from engine.catalogue.base import ClusterRecord, NodeRecord
from engine.metrics.series import MetricSeries

_MOST_NODES = 256  # that are told by themselves
_STATES = ("serving", "joining", "leaving")
_NODE_GAUGES: Sequence[tuple[str, str, Callable[[NodeRecord], float | None]]] = (
    ("load", "The part of a node's time that the placement plans for.", lambda node: node.load),
    ("slowdown", "Seconds of a node's steps over what its profile tells.", lambda node: node.slowdown),
    ("memory_bytes", "A node's memory for adapters.", lambda node: node.memory_bytes),
    ("memory_used_bytes", "Of that, what adapters take.", lambda node: node.used_bytes),
)


def coordinator_series(cluster: ClusterRecord) -> tuple[MetricSeries, ...]:
    """Tell the series of this moment."""
    nodes, size = cluster.nodes, cluster.size
    states = [((state,), float(sum(node.state == state for node in nodes))) for state in _STATES]
    bounds = [] if size is None else [(("lowest",), float(size.lowest)), (("highest",), float(size.highest))]
    return (
        _one("cluster_epoch", "Which coordinator leads; a later one has a larger number.", cluster.epoch),
        _one("cluster_adapters", "Names of adapters in the registry.", cluster.adapters),
        _one("cluster_routers", "Routers that have joined.", len(cluster.routers)),
        MetricSeries("loraserve_cluster_members", "Nodes that have joined, by state.", ("state",), states),
        _one(
            "cluster_nodes_wanted",
            "Nodes that there should be by the load; 0 where their number is fixed.",
            0 if size is None else size.wanted,
        ),
        MetricSeries(
            "loraserve_cluster_nodes_bounds",
            "Between how many nodes their number is chosen.",
            ("bound",),
            bounds,
        ),
        MetricSeries(
            "loraserve_replacements",
            "Times that the coordinator changed the placement.",
            (),
            [((), float(cluster.replacements or 0))],
            "counter",
        ),
        *_by_node(nodes[:_MOST_NODES]),
    )


def _by_node(nodes: Sequence[NodeRecord]) -> list[MetricSeries]:
    found = [
        MetricSeries(
            f"loraserve_node_{name}",
            told,
            ("node",),
            [((node.name,), float(value)) for node in nodes if (value := read(node)) is not None],
        )
        for name, told, read in _NODE_GAUGES
    ]
    kept = [
        ((node.name, state), float(count))
        for node in nodes
        for state, count in (("held", node.held), ("cached", node.cached), ("arriving", node.arriving))
        if count is not None
    ]
    told = "Adapters at a node: held by the placement, cached beyond it, or on their way."
    return [*found, MetricSeries("loraserve_node_adapters", told, ("node", "state"), kept)]


def _one(name: str, told: str, value: int | None) -> MetricSeries:
    return MetricSeries(f"loraserve_{name}", told, (), [] if value is None else [((), float(value))])
