"""A simulated router passes on what its decisions say, and hears the attempt that counts."""

from types import MappingProxyType

import numpy as np

from scheduler.cluster.cost.forecast import Forecast
from scheduler.cluster.cost.model import StepLoad
from scheduler.cluster.cost.profile import Lengths
from scheduler.cluster.protocol.agent import NodeAgent
from scheduler.cluster.routing.base import NodeLoad
from scheduler.cluster.routing.orders import RefusalReason, Refuse
from scheduler.request import Request, SamplingParams
from scheduler.sim.clock import Clock
from scheduler.sim.network import Network, NetworkFaults, NetworkTimes
from scheduler.sim.node import Listener, Progress, SimNode
from scheduler.sim.sim_router import SimRouter
from tests.scheduler.cluster.lossy import adapter
from tests.scheduler.sim.clusters import PROFILE, node_spec, routers

REQUEST = Request("r", (1, 2, 3), adapter("a"), SamplingParams(seed=0), (), 0.0)


class Puppet(SimNode):
    """A node that runs nothing; the test tells for it."""

    def __init__(self, name: str, clock: Clock) -> None:
        spec = node_spec()
        agent = NodeAgent(name, spec.machine)
        super().__init__(agent, spec, clock, lambda ref, sources, done: None, lambda *news: None)
        self.got: list[Request] = []

    def submit(self, request: Request, listener: Listener, number: int = 0) -> None:
        self.got.append(request)


class Rig:
    """A router of n1 and n2; the latter is heard of when the test says so."""

    def __init__(self) -> None:
        self.clock, self.number = Clock(), 0
        self.nodes = {name: Puppet(name, self.clock) for name in ("n1", "n2")}
        network = Network(
            self.clock, NetworkTimes(latency_s=0.1, detect_s=1.0), NetworkFaults(), np.random.default_rng(0)
        )
        self.answers: list[Progress] = []
        self.refusals: list[Refuse] = []
        forecast = Forecast(PROFILE.models[0], Lengths(300, 40))
        self.router = SimRouter(
            "router",
            routers(forecast)(np.random.default_rng(0)),
            self.clock,
            network,
            MappingProxyType(self.nodes),
            lambda name, progress: self.answers.append(progress),
            lambda name, refusal: self.refusals.append(refusal),
        )
        self.hear("n1")

    def hear(self, *nodes: str) -> None:
        for node in nodes:
            self.number += 1
            self.router.hear_load(node, NodeLoad(0, StepLoad((), 0), number=self.number))

    def wait(self, seconds: float) -> None:
        self.clock.run(self.clock.now + seconds)


def test_what_a_node_tells_reaches_the_client_and_a_repeat_does_not() -> None:
    rig = Rig()
    rig.router.take(REQUEST)
    rig.wait(0.2)
    assert [request.request_id for request in rig.nodes["n1"].got] == ["r#1"]
    rig.router.hear("n1", [("r#1", Progress.TOKEN)])
    rig.router.hear("n1", [("r#1", Progress.DONE), ("r#1", Progress.DONE)])
    assert rig.answers == [Progress.TOKEN, Progress.DONE]
    assert not rig.router.has("r")


def test_a_stream_moves_with_its_tokens_and_only_the_new_attempt_is_heard() -> None:
    rig = Rig()
    rig.router.take(REQUEST)
    rig.wait(0.2)
    rig.router.hear("n1", [("r#1", Progress.TOKEN)] * 2)
    rig.hear("n2")
    rig.router.lose("n1")
    rig.wait(0.2)
    [moved] = rig.nodes["n2"].got
    assert (moved.request_id, len(moved.drawn_token_ids)) == ("r#2", 2)
    rig.router.hear("n1", [("r#1", Progress.TOKEN), ("r#1", Progress.DONE)])
    assert len(rig.answers) == 2
    rig.router.hear("n2", [("r#2", Progress.TOKEN), ("r#2", Progress.DONE)])
    assert rig.answers == [*[Progress.TOKEN] * 3, Progress.DONE]


def test_a_node_found_dead_is_passed_by() -> None:
    rig = Rig()
    rig.nodes["n1"].up = False
    rig.router.take(REQUEST)
    rig.wait(0.2)
    rig.hear("n2")
    rig.wait(1.5)
    assert [request.request_id for request in rig.nodes["n2"].got] == ["r#2"]


def test_a_client_hears_of_a_refusal_once() -> None:
    rig = Rig()
    rig.router.lose("n1")
    rig.router.take(REQUEST)
    rig.wait(40.0)
    assert [refusal.reason for refusal in rig.refusals] == [RefusalReason.NO_NODE]
    assert not rig.router.has("r")
