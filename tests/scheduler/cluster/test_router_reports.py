"""The coordinator and routers: tables reach them, old tables are reckoned with, what they refuse is demand."""

from types import MappingProxyType

from lora.adapter import AdapterRef
from scheduler.cluster.coordinator.coordinator import Coordinator, CoordinatorOptions
from scheduler.cluster.coordinator.demand import DemandOptions, DemandTracker
from scheduler.cluster.coordinator.replan import Replanner, ReplanOptions
from scheduler.cluster.cost.model import Kernel
from scheduler.cluster.placement.base import Problem, Utilisation
from scheduler.cluster.placement.loraserve import LoraservePlacement
from scheduler.cluster.protocol.messages import AdapterAdded, Publish, RouterReport, Tick
from scheduler.cluster.state import Placement, Share
from tests.scheduler.cluster.lossy import MIB, LossyCluster, adapter

REFS = [adapter(f"a{at}", rank) for at, rank in enumerate([8, 8, 8, 16, 64, 128])]


class _Demand(DemandTracker):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(DemandOptions())
        self.seen: list[tuple[str, int]] = []

    def observe(self, adapter: AdapterRef, tokens: int, now: float) -> bool:
        self.seen.append((adapter.name, tokens))
        return super().observe(adapter, tokens, now)


def _cluster() -> LossyCluster:
    cluster = LossyCluster(2048 * MIB)
    for ref in REFS:
        cluster.add(ref)
    for at in range(3):
        cluster.start(f"n{at}")
    assert cluster.settle(20) > 5
    return cluster


def test_what_routers_refuse_is_demand_and_counts_once() -> None:
    demand = _Demand()
    planner = Replanner(LoraservePlacement(), Utilisation(Kernel.EXACT), ReplanOptions())
    coordinator = Coordinator(planner, demand, CoordinatorOptions())
    coordinator.on_event(AdapterAdded(REFS[0]), 0.0)
    unknown = adapter("unknown")
    for session, total in ((1, 100), (1, 100), (1, 250), (2, 30), (1, 900)):
        coordinator.on_event(RouterReport("r", 0, session, ((REFS[0], total), (unknown, 5))), 1.0)
    assert demand.seen == [("a0", 100), ("a0", 150), ("a0", 30)], "no double, no earlier session"


class _Scripted:
    """Puts everything on one node, which the test names."""

    def __init__(self) -> None:
        self.node = "n0"

    def place(self, problem: Problem) -> Placement:
        shares = {ref: (Share(self.node, 1.0),) for ref in problem.demand.tokens_per_s}
        return Placement(MappingProxyType(shares))


def test_a_copy_is_not_dropped_while_a_router_may_still_send_to_it() -> None:
    policy = _Scripted()
    options = ReplanOptions(interval_s=1.0, comfort=-1.0, min_gain=-1e9)
    planner = Replanner(policy, Utilisation(Kernel.EXACT), options)
    cluster = LossyCluster(
        2048 * MIB, Coordinator(planner, DemandTracker(DemandOptions()), CoordinatorOptions())
    )
    for ref in REFS:
        cluster.add(ref)
    for node in ("n0", "n1"):
        cluster.start(node)
    cluster.settle(20)
    version = cluster.coordinator.table.version
    cluster.tell(RouterReport("r", version))
    policy.node = "n1"
    for _ in range(10):
        cluster.tell(RouterReport("r", version))
        cluster.settle(1)
    assert cluster.coordinator.table.version > version
    assert all(cluster.agents["n0"].keeps(ref) for ref in REFS), "the router routes by the old table"
    cluster.tell(RouterReport("r", cluster.coordinator.table.version))
    cluster.settle(3)
    assert not any(cluster.agents["n0"].has(ref) for ref in REFS)


def test_routers_are_sent_each_table_until_they_say_that_they_have_it() -> None:
    cluster = _cluster()
    cluster.tell(RouterReport("r", 0))
    cluster.now += 2
    sent = [each for each in cluster.tell(Tick()) if isinstance(each, Publish) and "r" in each.routers]
    assert sent
    cluster.tell(RouterReport("r", cluster.coordinator.table.version))
    cluster.now += 2
    again = [each for each in cluster.tell(Tick()) if isinstance(each, Publish) and "r" in each.routers]
    assert not again


def test_a_router_of_an_earlier_session_is_not_heard() -> None:
    cluster = _cluster()
    cluster.tell(RouterReport("r", 0, 2))
    far = cluster.coordinator.table.version + 100
    cluster.tell(RouterReport("r", far, 1))
    cluster.settle(2)
    assert cluster.coordinator.table.version < far
