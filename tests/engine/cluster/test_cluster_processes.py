"""A cluster's processes: nodes come and go as they are wanted, and each is told to end once."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from engine.cluster.launching import cluster_processes
from engine.cluster.launching.cluster_processes import ClusterProcesses
from engine.cluster.launching.kept_process import KeptProcess
from engine.cluster.size_call import SizeTold

BOUND_S = 30.0
Scenario = Callable[["Fleet"], Awaitable[None]]


class FakeProcess(KeptProcess):
    """Runs until it is told to end, and ends when the test lets it."""

    def __init__(self, name: str, log: list[str]) -> None:
        super().__init__(name, ())
        self.may_end = asyncio.Event()
        self._log, self._over = log, asyncio.Event()

    async def run(self) -> None:
        self._log.append(f"{self.name} runs")
        await self._over.wait()

    async def end(self, drain_s: float) -> None:
        self._log.append(f"{self.name} drains")
        await self.may_end.wait()
        self._log.append(f"{self.name} ends")
        self._over.set()

    def start_no_more(self) -> None:
        pass

    def kill(self) -> None:
        self._over.set()


class Fleet:
    """A coordinator that wants what the test says, and the processes."""

    def __init__(self, first: int) -> None:
        self.log: list[str] = []
        self.made: dict[str, FakeProcess] = {}
        self.wanted: int | None = None
        self.asked: list[int] = []
        names = ("coordinator", *(f"node-{at}" for at in range(first)), "router-0")
        self.cluster = ClusterProcesses(
            [self._make(name) for name in names], lambda at: self._make(f"node-{at}"), 5.0
        )

    def _make(self, name: str) -> FakeProcess:
        made = self.made[name] = FakeProcess(name, self.log)
        return made

    async def ask(self, running: int) -> SizeTold | None:
        self.asked.append(running)
        return None if self.wanted is None else SizeTold(self.wanted, "the test says so")

    @property
    def nodes(self) -> list[str]:
        return [each.name for each in self.cluster.nodes]

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(BOUND_S):
            while not holds():
                await asyncio.sleep(0.001)

    async def looks(self) -> None:
        """Wait for two more answers of the coordinator."""
        count = len(self.asked) + 2
        await self.until(lambda: len(self.asked) >= count)

    def let_all_end(self) -> None:
        for each in self.made.values():
            each.may_end.set()


def run(first: int, scenario: Scenario) -> list[str]:
    """Run a scenario, then stop the cluster; return what happened in order."""

    async def main() -> list[str]:
        fleet = Fleet(first)
        running = asyncio.create_task(fleet.cluster.run(fleet.ask))
        await scenario(fleet)
        fleet.cluster.stop()
        fleet.let_all_end()
        async with asyncio.timeout(BOUND_S):
            assert await running == 0
        return fleet.log

    return asyncio.run(main())


@pytest.fixture(autouse=True)
def asks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_processes, "_ASK_S", 0.005)


def test_nodes_come_as_they_are_wanted_and_all_end_in_order() -> None:
    async def scenario(fleet: Fleet) -> None:
        fleet.wanted = 3
        await fleet.until(lambda: fleet.nodes == ["node-0", "node-1", "node-2"])
        await fleet.looks()
        assert fleet.asked[-1] == 3

    log = run(1, scenario)
    assert [line for line in log if line.endswith("runs") and line.startswith("node")] == [
        "node-0 runs", "node-1 runs", "node-2 runs",
    ]  # fmt: skip
    ends = [line.partition(" ")[0] for line in log if line.endswith("ends")]
    assert ends == ["router-0", "node-0", "node-1", "node-2", "coordinator"]


def test_the_youngest_node_drains_and_only_then_ends() -> None:
    async def scenario(fleet: Fleet) -> None:
        fleet.wanted = 2
        await fleet.until(lambda: "node-2 drains" in fleet.log)
        await fleet.looks()
        assert fleet.nodes == ["node-0", "node-1"]
        assert fleet.asked[-1] == 2, "one that drains does not count"
        assert "node-2 ends" not in fleet.log
        fleet.made["node-2"].may_end.set()
        await fleet.until(lambda: "node-2 ends" in fleet.log)

    assert run(3, scenario).count("node-2 drains") == 1


def test_a_node_that_comes_while_another_drains_has_a_name_of_its_own() -> None:
    async def scenario(fleet: Fleet) -> None:
        fleet.wanted = 1
        await fleet.until(lambda: "node-1 drains" in fleet.log)
        fleet.wanted = 2
        await fleet.until(lambda: fleet.nodes == ["node-0", "node-2"])
        fleet.made["node-1"].may_end.set()
        await fleet.until(lambda: "node-1 ends" in fleet.log)
        fleet.wanted = 3
        await fleet.until(lambda: fleet.nodes == ["node-0", "node-2", "node-1"])

    run(2, scenario)


def test_a_cluster_that_stops_while_a_node_drains_tells_it_so_once() -> None:
    async def scenario(fleet: Fleet) -> None:
        fleet.wanted = 1
        await fleet.until(lambda: "node-1 drains" in fleet.log)

    assert run(2, scenario).count("node-1 drains") == 1


def test_while_no_coordinator_answers_nothing_changes() -> None:
    async def scenario(fleet: Fleet) -> None:
        fleet.wanted = 2
        await fleet.until(lambda: len(fleet.nodes) == 2)
        fleet.wanted = None
        await fleet.looks()
        assert fleet.nodes == ["node-0", "node-1"]

    run(1, scenario)
