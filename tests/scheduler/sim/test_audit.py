"""The promises that the simulator checks after every event are checked: each, once broken, ends the run."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import cast

import numpy as np
import pytest

from lora.adapter import AdapterRef
from lora.memory.base import PageRun
from lora.memory.page_allocator import PageAllocator
from scheduler.cluster.coordinator.coordinator import Coordinator
from scheduler.cluster.coordinator.node_view import Copy
from scheduler.cluster.protocol.messages import Command, Drop, Event, Publish
from scheduler.cluster.state import EMPTY_TABLE, RoutingTable, Share
from scheduler.sim.clients import Clients
from scheduler.sim.memory.store import SimStore
from scheduler.sim.node import Progress, SimNode
from scheduler.sim.sim_router import SimRouter
from scheduler.sim.simulator import Simulator
from scheduler.sim.spec import FaultKind, SimulatorSpec
from scheduler.step import StepScheduler
from tests.scheduler.sim.clusters import MIB, adapters, draw_faults, names, node_spec, simulator_spec, traffic

REFS = adapters(12)


def _run(spec: SimulatorSpec) -> None:
    Simulator(spec, seed=0, audit=True).run(traffic(REFS, 10.0, 20.0, seed=1), 20.0, drain_s=20.0)


def _spec() -> SimulatorSpec:
    return simulator_spec(2, REFS, node_spec(memory_bytes=400 * MIB))


def _take_more_than_there_is(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        PageAllocator,
        "allocate",
        lambda self, count, kept=None: PageRun(self.num_pages, self.num_pages + count),
    )


def _take_the_same_pages(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PageAllocator, "allocate", lambda self, count, kept=None: PageRun(0, count))


def _keep_what_is_ceded(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SimStore, "extend", lambda self, pages: self._placed.extend(2 * pages))


def _forget_requests(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(StepScheduler, "add", lambda self, request: None)


def _forget_at_the_router(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SimRouter, "take", lambda self, request: None)


def _answer_twice(patch: pytest.MonkeyPatch) -> None:
    answer = Clients.answer

    def twice(self: Clients, name: str, progress: Progress) -> None:
        answer(self, name, progress)
        if progress is Progress.DONE:
            answer(self, name, progress)

    patch.setattr(Clients, "answer", twice)


def _sleep_on_arrivals(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SimNode, "_adapter_came", lambda self: None)


def test_a_run_that_nothing_harms_ends_well() -> None:
    """So what ends the runs below is their harm."""
    _run(_spec())


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (_take_more_than_there_is, "beyond their pages|in one page"),
        (_take_the_same_pages, "two adapters in one page"),
        (_keep_what_is_ceded, "holds more than its card has"),
        (_forget_requests, "is lost on n"),
        (_forget_at_the_router, "does not know it"),
        (_answer_twice, "answered twice"),
        (_sleep_on_arrivals, "has work and does nothing"),
    ],
)
def test_a_broken_node_or_router_ends_the_run(
    harm: Callable[[pytest.MonkeyPatch], None], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    harm(monkeypatch)
    with pytest.raises(AssertionError, match=says):
        _run(_spec())


@dataclass
class _Harmful:
    """Commands one thing over and over."""

    command: Command
    table: RoutingTable = EMPTY_TABLE

    def on_event(self, event: Event, now: float) -> list[Command]:
        return [self.command]

    def copies(self, adapter: AdapterRef) -> dict[str, Copy]:
        return {"n0": Copy.DROPPING}


HALF = RoutingTable(1, MappingProxyType({REFS[0]: (Share("n0", 0.5),)}))


@pytest.mark.parametrize(
    ("command", "says"), [(Publish(("n0",), HALF), "φ of"), (Drop("n0", 1, 1, REFS[0]), "would be lost")]
)
def test_a_coordinator_that_breaks_a_promise_ends_the_run(command: Command, says: str) -> None:
    spec = replace(_spec(), coordinator=lambda epoch: cast(Coordinator, _Harmful(command)))
    with pytest.raises(AssertionError, match=says):
        _run(spec)


def test_faults_of_every_drawn_kind_come() -> None:
    """Nodes that leave for good are told to; routers take their clients with them. Neither is drawn."""
    kinds = {fault.kind for fault in draw_faults(60, 60.0, names(4), np.random.default_rng(0))}
    assert kinds == set(FaultKind) - {FaultKind.LEAVE, FaultKind.ROUTER}


@pytest.mark.slow
def test_a_history_does_not_depend_on_the_process_that_simulates_it() -> None:
    """Strings hash differently in each."""
    code = (
        "from tests.scheduler.sim.clusters import chaos\n"
        "from scheduler.sim.simulator import Simulator\n"
        "spec, arrivals = chaos(5)\n"
        "simulator = Simulator(spec, 5)\n"
        "simulator.run(arrivals, 40.0)\n"
        "print(simulator.history.digest())"
    )
    found = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert found[0] == found[1] != ""
