"""A node does what its coordinator says: it fetches, keeps and frees contents, and tells what became of them."""

import asyncio
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from engine.catalogue.base import CatalogueEntry
from engine.cluster.control.ask_messages import Ask
from engine.cluster.node.agent_runner import AgentRunner
from engine.cluster.node.node_names import NodeNames
from engine.cluster.view import ClusterView, Member
from lora.adapter import AdapterEntry, AdapterRef
from lora.errors import AdapterRefused, UnknownAdapter
from lora.format.companions import NO_COMPANIONS, Companions
from lora.sources.source_url import SourceUrl
from scheduler.cluster.protocol.agent import NodeAgent
from scheduler.cluster.protocol.messages import AllowLeave, Drop, Pull, Rejoin
from tests.engine.cluster.control_rig import MACHINE, control_rig, ref_of, until
from transport.base import Address

A, B = ref_of("a"), ref_of("b")


class FakePlaced:
    """A store in which contents arrive at once, unless they are `held_up` or `missing`."""

    def __init__(self) -> None:
        self.learnt: dict[str, tuple[Address, ...]] = {}
        self.fetched: dict[str, str] = {}
        self.kept: set[str] = set()
        self.missing: set[str] = set()
        self.used: set[str] = set()
        self.go_on = threading.Event()
        self.go_on.set()

    def learn(self, ref: AdapterRef, name: str, sources: Sequence[Address]) -> None:
        self.go_on.wait(10)
        if ref.digest in self.missing:
            raise UnknownAdapter(name)
        self.learnt[name] = tuple(sources)

    def fetch(self, ref: AdapterRef, url: SourceUrl) -> None:
        self.fetched[ref.name] = str(url)

    def keep(self, ref: AdapterRef) -> None:
        self.kept.add(ref.digest)

    def drop(self, ref: AdapterRef) -> None:
        self.kept.discard(ref.digest)

    def tiers(self) -> Mapping[str, str]:
        return dict.fromkeys(self.kept | self.used, "device")


class FakeNames:
    """One name that is sound, and one that is not."""

    def entries(self) -> tuple[AdapterEntry, ...]:
        return (AdapterEntry("a", Path("/a"), None), AdapterEntry("told", None, B))

    def resolve(self, name: str) -> AdapterRef:
        if name == "a":
            return A
        if name == "broken":
            raise ZeroDivisionError
        raise AdapterRefused(name, "its rank is 0: give another")

    def companions(self, name: str) -> Companions:
        return NO_COMPANIONS


def runner_of(placed: FakePlaced, name: str = "n1", view: ClusterView | None = None) -> AgentRunner:
    async def load(name: str, folder: Path, replaces: bool) -> AdapterRef:
        return A

    async def unload(name: str) -> None:
        return None

    names = NodeNames(FakeNames(), load, unload)
    return AgentRunner(NodeAgent(name, MACHINE, 5), placed, lambda: placed.used, names, view or ClusterView())


def test_what_no_member_has_is_fetched_from_where_its_name_was_registered() -> None:
    async def scenario() -> None:
        placed = FakePlaced()
        placed.missing |= {A.digest, B.digest}
        entries = {"a": CatalogueEntry("a", A, "s3://bucket/a"), "b": CatalogueEntry("b", B, "/folder/b")}
        runner = runner_of(placed, view=ClusterView(catalogue=entries))
        runner.obey(Pull("n1", 5, 1, A, ()))
        runner.obey(Pull("n1", 5, 2, B, ()))
        await until(lambda: runner.agent.keeps(A) and not runner.agent.holds(B))
        assert placed.fetched == {"a": "s3://bucket/a"}
        await runner.close()

    asyncio.run(scenario())


def test_a_pull_is_learnt_from_its_sources_first_and_then_from_any_member() -> None:
    async def scenario() -> None:
        members = {
            name: Member(name, 1, "h:1", f"10.0.0.{at}:7") for at, name in enumerate(("n1", "n2", "n3"))
        }
        placed = FakePlaced()
        runner = runner_of(placed, view=ClusterView(members))
        runner.obey(Pull("n1", 5, 1, A, ("n3",)))
        await until(lambda: runner.agent.keeps(A))
        assert placed.learnt == {"a": (Address("10.0.0.2", 7), Address("10.0.0.1", 7))}
        report = runner.report()
        assert (report.held, report.applied, report.cached) == ((A,), 1, ())
        await runner.close()

    asyncio.run(scenario())


def test_what_cannot_be_had_is_not_held_and_what_is_called_off_is_dropped() -> None:
    async def scenario() -> None:
        placed = FakePlaced()
        runner = runner_of(placed)
        placed.missing.add(A.digest)
        runner.obey(Pull("n1", 5, 1, A, ()))
        await until(lambda: not runner.agent.holds(A))
        placed.go_on.clear()
        runner.obey(Pull("n1", 5, 2, B, ()))
        runner.obey(Drop("n1", 5, 3, B))
        placed.go_on.set()
        await until(lambda: "b" in placed.learnt and not placed.kept)
        assert runner.report().held == ()
        await runner.close()

    asyncio.run(scenario())


def test_a_dropped_content_is_held_until_its_requests_have_ended_also_if_it_is_wanted_again() -> None:
    async def scenario() -> None:
        placed = FakePlaced()
        runner = runner_of(placed)
        runner.obey(Pull("n1", 5, 1, A, ()))
        await until(lambda: runner.agent.keeps(A))
        placed.used.add(A.digest)
        runner.obey(Drop("n1", 5, 2, A))
        assert (runner.report().held, placed.kept) == ((A,), set())
        runner.obey(Pull("n1", 5, 3, A, ()))
        await until(lambda: placed.kept == {A.digest} and runner.agent.keeps(A))
        runner.obey(Drop("n1", 5, 4, A))
        placed.used.clear()
        assert runner.report().held == ()
        await runner.close()

    asyncio.run(scenario())


def test_a_node_that_must_rejoin_keeps_what_it_was_draining() -> None:
    async def scenario() -> None:
        placed = FakePlaced()
        runner = runner_of(placed)
        runner.obey(Pull("n1", 5, 1, A, ()))
        await until(lambda: runner.agent.keeps(A))
        placed.used.add(A.digest)
        runner.obey(Drop("n1", 5, 2, A))
        runner.obey(Rejoin("n1", 5, 9))
        await until(lambda: placed.kept == {A.digest} and runner.agent.keeps(A))
        assert runner.session == 9
        await runner.close()

    asyncio.run(scenario())


def test_the_store_tells_from_its_own_threads() -> None:
    async def scenario() -> None:
        runner = runner_of(FakePlaced())
        runner.obey(Pull("n1", 5, 1, A, ()))
        await until(lambda: runner.agent.keeps(A))
        await asyncio.to_thread(runner.displaced, A)
        await until(lambda: not runner.agent.keeps(A))
        await asyncio.to_thread(runner.arrived, A)
        await until(lambda: runner.agent.keeps(A))
        await asyncio.to_thread(runner.displaced, A)
        await asyncio.to_thread(runner.failed, A, RuntimeError("no peer"))
        await until(lambda: not runner.agent.holds(A))
        await runner.close()

    asyncio.run(scenario())


def test_names_are_told_and_resolved_and_what_fails_is_answered() -> None:
    async def scenario() -> None:
        runner = runner_of(FakePlaced())
        assert runner.declared() == {"a": ""}
        answer = await runner.answer(Ask(1, "resolve", "a"))
        assert answer.entry is not None
        assert (answer.entry.entry().ref, answer.entry.root) == (A, "/a")
        assert (await runner.answer(Ask(2, "resolve", "bad"))).fault == "invalid"
        assert (await runner.answer(Ask(3, "resolve", "broken"))).fault == "failed"
        assert (await runner.answer(Ask(4, "unload", "a"))).fault is None
        assert await runner.leave(0) is False
        runner.obey(AllowLeave("n1", 5, 1))
        assert await runner.leave(0.1) is True
        await runner.close()

    asyncio.run(scenario())


def test_under_a_coordinator_its_contents_come_by_themselves() -> None:
    async def scenario() -> None:
        async with control_rig() as rig:
            await rig.coordinator()
            placed, view = FakePlaced(), ClusterView()
            runner = runner_of(placed, "n1", view)
            rig.join_node(runner, view)
            await until(lambda: A in view.table.shares)
            await until(lambda: placed.kept == {A.digest})  # the order may come after the view
            runner.took(A, 40)
            await until(lambda: rig.server is not None and not runner.report().taken)
            await runner.close()

    asyncio.run(scenario())
