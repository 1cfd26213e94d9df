"""A front door answers each request exactly once, whatever nodes and connections do."""

from types import MappingProxyType

import numpy as np

from scheduler.cluster.cost.model import StepLoad
from scheduler.cluster.protocol.agent import NodeAgent
from scheduler.cluster.routing.base import NodeLoad
from scheduler.cluster.routing.baselines import LeastLoadedRouting
from scheduler.request import Request, SamplingParams
from scheduler.sim.clock import Action, Clock
from scheduler.sim.front_door import FrontDoor, Outbound, Patience
from scheduler.sim.network import Network, NetworkFaults, NetworkTimes
from scheduler.sim.node import Progress, SimNode, Tell
from tests.scheduler.cluster.lossy import adapter
from tests.scheduler.sim.clusters import node_spec

REQUEST = Request("r", (1, 2, 3), adapter("a"), SamplingParams(seed=0), (), 0.0)
IDLE = NodeLoad(0, StepLoad((), 0))


class Puppet(SimNode):
    """A node that runs nothing; the test tells for it."""

    def __init__(self, name: str, clock: Clock) -> None:
        spec = node_spec()
        super().__init__(NodeAgent(name, spec.machine), spec, clock, lambda ref, sources, done: None)
        self.got: list[tuple[str, Tell]] = []

    def submit(self, request: Request, tell: Tell, on_token: Action = lambda: None) -> None:
        self.got.append((request.request_id, tell))


class Rig:
    """A front door at n0 that sends to n1, or to n2 if n1 is not in the loads."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.nodes = {name: Puppet(name, self.clock) for name in ("n0", "n1", "n2")}
        network = Network(
            self.clock, NetworkTimes(latency_s=0.1, detect_s=1.0), NetworkFaults(), np.random.default_rng(0)
        )
        self.outbound = Outbound(self.clock, network, MappingProxyType(self.nodes))
        self.outbound.loads = {"n1": IDLE, "n2": IDLE}
        self.answers: list[Progress] = []
        self.front_door = FrontDoor(
            self.nodes["n0"],
            self.outbound,
            LeastLoadedRouting(),
            np.random.default_rng(0),
            lambda name, progress: self.answers.append(progress),
        )

    def wait(self, seconds: float) -> None:
        self.clock.run(self.clock.now + seconds)


def test_what_a_node_tells_reaches_the_client_and_a_repeat_does_not() -> None:
    rig = Rig()
    rig.front_door.take(REQUEST)
    rig.wait(0.2)
    [(name, tell)] = rig.nodes["n1"].got
    assert name == "r#1"
    for progress in (Progress.FIRST_TOKEN, Progress.DONE, Progress.DONE):
        tell(progress)
        rig.wait(0.2)
    assert rig.answers == [Progress.FIRST_TOKEN, Progress.DONE]
    assert not rig.front_door.has("r")


def test_after_a_broken_connection_only_the_new_attempt_is_heard() -> None:
    rig = Rig()
    rig.front_door.take(REQUEST)
    rig.wait(0.2)
    rig.outbound.loads = {"n2": IDLE}
    rig.front_door.broke("n1")
    rig.wait(1.5)
    [(_, earlier)], [(name, later)] = rig.nodes["n1"].got, rig.nodes["n2"].got
    assert name == "r#2"
    earlier(Progress.DONE)
    rig.wait(0.2)
    assert rig.answers == []
    later(Progress.DONE)
    rig.wait(0.2)
    assert rig.answers == [Progress.DONE]


def test_a_node_found_dead_is_passed_by() -> None:
    rig = Rig()
    rig.nodes["n1"].up = False
    rig.front_door.take(REQUEST)
    rig.wait(0.2)
    rig.outbound.loads = {"n2": IDLE}
    rig.wait(1.5)
    assert [name for name, _ in rig.nodes["n2"].got] == ["r#2"]


def test_refusals_are_retried_and_then_told() -> None:
    rig = Rig()
    rig.outbound.loads = {"n1": IDLE}
    rig.front_door.take(REQUEST)
    for attempt in range(Patience().attempts):
        rig.wait(0.2)
        assert len(rig.nodes["n1"].got) == attempt + 1
        rig.nodes["n1"].got[-1][1](Progress.REFUSED)
        rig.wait(0.7)
    rig.wait(2.0)
    assert rig.answers == [Progress.REFUSED]


def test_a_request_waits_for_a_node_to_be_reachable() -> None:
    rig = Rig()
    rig.outbound.loads = {}
    rig.front_door.take(REQUEST)
    rig.wait(1.2)
    assert rig.front_door.pending() == ["r"]
    rig.outbound.loads = {"n1": IDLE}
    rig.wait(1.0)
    assert len(rig.nodes["n1"].got) == 1
