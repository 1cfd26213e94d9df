"""Members and their coordinator over real sockets: who joins is placed on, who goes is missed, and names stay right."""

import asyncio
from pathlib import Path

import pytest

from engine.catalogue.base import EntrySettings
from engine.cluster.control.cluster_status import adapters_of_view, cluster_of_view
from engine.cluster.control.control_client import ControlClient
from engine.cluster.control.control_messages import VERSION, MemberHello, encoded
from engine.errors import AdapterExists, InvalidAdapter, InvalidAdapterName, NotInTime, UnknownModel
from scheduler.cluster.protocol.messages import Drop, Pull
from tests.engine.cluster.control_rig import ControlRig, FakeNode, control_rig, names_of, ref_of, until

PATH = "/loraserve.Control/Join"


def test_names_that_nodes_declare_are_placed_and_every_member_hears_of_them() -> None:
    async def scenario() -> None:
        async with control_rig() as rig:
            await rig.coordinator()
            declared = {f"a{at}": 0 for at in range(6)}
            nodes = [rig.node("n1", declared), rig.node("n2", declared), rig.node("n3")]
            router = rig.router("r1")
            await until(lambda: len(router.view.table.shares) == 6)
            assert router.view.catalogue.keys() == declared.keys()
            assert {name: each.address for name, each in router.view.members.items()} == {
                name: f"{name}:1" for name in ("n1", "n2", "n3")
            }
            for ref, shares in router.view.table.shares.items():
                homes = {share.node for share in shares}
                assert homes <= {node.agent.node for node, _ in nodes if ref.name in node.held}
            await until(lambda: all(client.view.table == router.view.table for _, client in nodes))
            asked = [ask.name for node, _ in nodes for ask in node.asked]
            assert sorted(asked) == sorted(declared)  # each name is read once in the cluster

    asyncio.run(scenario())


def test_a_client_registers_replaces_and_removes_a_name_everywhere() -> None:
    async def scenario() -> None:
        async with control_rig() as rig:
            await rig.coordinator()
            (one, _), (two, _), router = rig.node("n1"), rig.node("n2"), rig.router("r1")
            await until(lambda: len(router.view.members) == 2)
            admin = router.administration
            first = await admin.register("poet", Path("/good"), False)
            await until(lambda: router.view.catalogue.get("poet") == first)
            await until(lambda: first.ref in router.view.table.shares)
            with pytest.raises(AdapterExists):
                await admin.register("poet", Path("/good"), False)
            second = await admin.register("poet", Path("/good/2"), True)
            assert second.ref != first.ref
            await until(lambda: router.view.catalogue["poet"] == second)
            await until(lambda: list(router.view.table.shares) == [second.ref])
            await until(lambda: all(first.ref not in node.agent.report().held for node in (one, two)))
            with pytest.raises(InvalidAdapter, match="no PEFT folder"):
                await admin.register("other", Path("/bad"), False)
            with pytest.raises(InvalidAdapterName):
                await admin.register("no good", Path("/good"), False)
            alias = await admin.set_alias("latest", "poet")
            assert (alias.name, alias.ref) == ("latest", second.ref)
            await admin.remove("poet")
            await until(lambda: set(router.view.catalogue) == {"latest"})
            assert second.ref in router.view.table.shares
            await admin.remove("latest")
            await until(lambda: not router.view.table.shares and not router.view.catalogue)
            await until(lambda: not (one.held or two.held or one.folders or two.folders))
            with pytest.raises(UnknownModel):
                await admin.remove("poet")

    asyncio.run(scenario())


def test_a_node_that_goes_down_is_missed_and_taken_back() -> None:
    async def scenario() -> None:
        async with control_rig() as rig:
            await rig.coordinator()
            _, router = rig.node("n1", {f"a{at}": 0 for at in range(6)}), rig.router("r1")
            _, lost = rig.node("n2")
            await until(lambda: {"n1", "n2"} == _homes(router))
            await lost.close()
            await until(lambda: _homes(router) == {"n1"} and set(router.view.members) == {"n1"})
            assert len(router.view.table.shares) == 6
            rig.node("n2")
            await until(lambda: _homes(router) == {"n1", "n2"})

    asyncio.run(scenario())


def _homes(router: ControlClient) -> set[str]:
    return {share.node for shares in router.view.table.shares.values() for share in shares}


def test_a_node_that_asks_to_leave_serves_until_nothing_is_routed_to_it() -> None:
    async def scenario() -> None:
        async with control_rig() as rig:
            await rig.coordinator()
            rig.node("n1", {f"a{at}": 0 for at in range(6)})
            leaving, _ = rig.node("n2")
            router = rig.router("r1")
            await until(lambda: _homes(router) == {"n1", "n2"})
            leaving.is_leaving = True
            await until(lambda: leaving.may_go)
            assert _homes(router) == {"n1"}
            assert len(router.view.table.shares) == 6

    asyncio.run(scenario())


def test_without_a_coordinator_members_keep_their_view_and_a_successor_moves_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with control_rig() as rig:
            await rig.coordinator(tmp_path / "catalogue")
            (one, _), (two, _), router = rig.node("n1", {"a": 0, "b": 0}), rig.node("n2"), rig.router("r1")
            await until(lambda: len(router.view.members) == 2)
            await router.administration.register("c", Path("/good"), False)
            await until(lambda: len(router.view.table.shares) == 3)
            seen: list[int] = []
            router.view.changed.append(lambda: seen.append(len(router.view.table.shares)))
            await rig.kill_coordinator()
            await until(lambda: not router.is_connected)
            before = router.view.table
            with pytest.raises(NotInTime, match="no coordinator answers"):
                await router.administration.remove("a")
            assert (router.view.table, set(router.view.catalogue)) == (before, {"a", "b", "c"})
            for node in (one, two):
                node.commands.clear()
            server = await rig.coordinator(tmp_path / "catalogue")
            await until(lambda: router.view.table.version > before.version)
            assert router.view.table.shares == before.shares
            assert set(server.catalogue.names) == {"a", "b", "c"}
            moved = [each for node in (one, two) for each in node.commands if isinstance(each, Pull | Drop)]
            assert moved == []
            assert set(seen) == {3}

    asyncio.run(scenario())


def test_a_folder_that_changes_and_one_that_goes_are_followed() -> None:
    async def scenario() -> None:
        async with control_rig() as rig:
            await rig.coordinator()
            (node, _), router = rig.node("n1", {"a": 1, "b": 1}), rig.router("r1")
            await until(lambda: set(router.view.catalogue) == {"a", "b"})
            node.folders["a"] = 2
            await until(lambda: router.view.catalogue["a"].ref == ref_of("a", 2))
            del node.folders["b"]
            await until(lambda: set(router.view.catalogue) == {"a"})
            await until(lambda: names_of(router.view.table.shares) == {"a"})

    asyncio.run(scenario())


def test_of_two_coordinators_the_later_leads_and_the_other_ends(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with control_rig() as rig, control_rig() as other:
            first = await rig.coordinator(tmp_path / "catalogue")
            failed = asyncio.Event()
            first.on_failure(failed.set)
            router = rig.router("r1")
            await until(lambda: router.is_connected)
            second = await other.coordinator(tmp_path / "catalogue")
            await asyncio.wait_for(failed.wait(), 10)
            assert "--registry-file" in str(first.failure)
            rig.port = other.port
            await until(lambda: "r1" in second.streams)

    asyncio.run(scenario())


def test_a_name_twice_and_another_base_model_are_turned_away() -> None:
    async def scenario() -> None:
        async with control_rig() as rig:
            server = await rig.coordinator()
            older, newer = FakeNode("n1", {}), FakeNode("n1", {})
            joined = rig.join(newer)
            await until(lambda: joined.is_connected)
            twice, strange = rig.join(older), rig.join(FakeNode("n2", {}), "other weights")
            assert "began later" in await _refusal(rig, older, "w")
            assert "same weights" in await _refusal(rig, FakeNode("n3", {}), "other weights")
            assert "same --profile" in await _refusal(rig, FakeNode("n3", {}), "w", profile="f" * 64)
            assert [twice.is_connected, strange.is_connected] == [False, False]
            assert set(server.streams) == {"n1"}

    asyncio.run(scenario())


async def _refusal(rig: ControlRig, node: FakeNode, weights: str, profile: str = "") -> str:
    hello = MemberHello(VERSION, node.agent.node, "node", node.session, weights=weights, profile=profile)
    async with rig.channel() as channel:
        call = channel.stream_stream(PATH)()
        await call.write(encoded(hello))
        answer = await call.read()
        assert isinstance(answer, bytes)
        return answer.decode(errors="replace")


@pytest.mark.parametrize(
    "frames", [[b"\xc1"], [b""], [encoded(MemberHello(VERSION, "x", "node", 1)), b"\xc1" * 100]]
)
def test_garbage_ends_its_own_stream_and_no_other(
    frames: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with control_rig() as rig:
            server = await rig.coordinator()
            router = rig.router("r1")
            await until(lambda: router.is_connected)
            for _ in range(30):
                async with rig.channel() as channel:
                    call = channel.stream_stream(PATH)()
                    for frame in frames:
                        await call.write(frame)
                    while isinstance(await call.read(), bytes):
                        pass
            assert router.is_connected
            assert set(server.streams) == {"r1"}

    asyncio.run(scenario())
    lines = [
        each
        for each in caplog.records
        if each.name.endswith("coordinator_server") and each.levelname == "WARNING"
    ]
    assert 1 <= len(lines) <= 10


def test_one_more_among_three_hundred_adapters_costs_a_member_little() -> None:
    async def scenario() -> None:
        async with control_rig() as rig:
            server = await rig.coordinator()
            rig.node("n1", {f"tenant/{at}": 0 for at in range(300)})
            router = rig.router("r1")
            await until(lambda: len(router.view.table.shares) == 300)
            stream = server.streams["r1"]
            sent: list[int] = []
            whole_send = stream.send_frame

            def send_frame(frame: bytes) -> None:
                sent.append(len(frame))
                whole_send(frame)

            stream.send_frame = send_frame
            await router.administration.register("one/more", Path("/good"), False)
            await until(lambda: len(router.view.table.shares) == 301)
            assert sum(sent) < 2000

    asyncio.run(scenario())


def test_an_operator_is_told_who_is_there_and_where_each_adapter_is() -> None:
    async def scenario() -> None:
        async with control_rig() as rig:
            server = await rig.coordinator()
            rig.node("n1", {"a": 0, "b": 0, "c": 0})
            router = rig.router("r1")
            admin = router.administration
            await until(lambda: len(router.view.table.shares) == 3 and server.streams["r1"].report)
            await until(lambda: server.status.cluster().nodes[0].held == 3)
            status = await admin.cluster()
            (node,), (routed,) = status.nodes, status.routers
            assert (status.epoch, status.adapters) == (server.catalogue.epoch, 3)
            assert (node.name, node.state, node.memory_bytes) == ("n1", "serving", 1 << 40)
            assert (node.held, node.used_bytes, node.arriving) == (3, 3 << 20, 0)
            assert routed.name == "r1"
            assert status.replacements == len(status.last_replacements)
            assert all("start" in each.reasons and each.moves for each in status.last_replacements[-1:])
            record = await admin.adapter("a")
            assert record is not None
            assert (record.version, record.copies, record.tiers) == (ref_of("a").digest, 1, {"n1": "device"})
            assert record.shares == {"n1": 1.0}
            assert await admin.adapter("nobody") is None
            pages = [await admin.adapters(after, 2) for after in ("", "b", "z")]
            assert [[each.name for each in page] for page in pages] == [["a", "b"], ["c"], []]
            await rig.kill_coordinator()
            await until(lambda: not router.is_connected)
            with pytest.raises(NotInTime):
                await admin.cluster()
            remembered = cluster_of_view(router.view)
            assert (remembered.epoch, [each.name for each in remembered.nodes]) == (None, ["n1"])
            (remembered_a,) = adapters_of_view(router.view, ["a"])
            assert (remembered_a.version, remembered_a.shares) == (record.version, {"n1": 1.0})
            await rig.coordinator()

    asyncio.run(scenario())


def test_a_pin_is_kept_by_its_name_and_brings_copies_whatever_the_name_comes_to_mean(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with control_rig() as rig:
            await rig.coordinator(tmp_path / "catalogue")
            nodes = [rig.node(name)[0] for name in ("n1", "n2", "n3")]
            router = rig.router("r1")
            admin = router.administration
            await until(lambda: len(router.view.members) == 3)

            def copies(name: str) -> int:
                entry = router.view.catalogue.get(name)
                return sum(entry is not None and node.agent.keeps(entry.ref) for node in nodes)

            await admin.register("poet", Path("/good"), False)
            await until(lambda: copies("poet") == 1)
            await admin.set("poet", EntrySettings(pinned=2, max_requests=5))
            await until(lambda: copies("poet") == 2)
            await admin.register("poet", Path("/good/2"), True)
            await until(lambda: router.view.catalogue["poet"].root == "/good/2")
            assert (router.view.catalogue["poet"].pinned, router.view.catalogue["poet"].max_requests) == (
                2,
                5,
            )
            await admin.register("novel", Path("/good/33"), False)
            await admin.set_alias("poet", "novel")
            await until(lambda: router.view.catalogue["poet"].alias_of == "novel")
            assert router.view.catalogue["poet"].pinned == 2
            await until(lambda: copies("novel") == 2)
            with pytest.raises(UnknownModel):
                await admin.set("nobody", EntrySettings(pinned=1))
            await rig.kill_coordinator()
            await until(lambda: not router.is_connected)
            server = await rig.coordinator(tmp_path / "catalogue")
            assert server.catalogue.entries["poet"].pinned == 2
            await until(lambda: router.is_connected)
            await admin.set("poet", EntrySettings(pinned=0))
            assert server.catalogue.entries["poet"].max_requests == 5

    asyncio.run(scenario())
