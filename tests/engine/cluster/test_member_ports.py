"""The ports that members of a cluster share: whoever lacks the token joins, asks and fills nothing.

What a member repeats, or says that is no part of its role, ends its own stream at most. No log tells the token.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import pytest

from engine.catalogue.catalogue_file import CatalogueFile
from engine.cluster.control import coordinator_server
from engine.cluster.control.ask_messages import Ask
from engine.cluster.control.control_client import ControlClient, CoordinatorConnection
from engine.cluster.control.control_messages import (
    VERSION,
    Declares,
    LeaveAsk,
    MemberHello,
    PullOrder,
    encoded,
)
from engine.cluster.control.control_values import WireAdapter
from engine.cluster.control.coordinator_server import METHOD, SERVICE, CoordinatorServer
from engine.cluster.trusted_channels import MemberServer, Metadata, call_metadata, member_channel
from engine.cluster.view import ClusterView
from scheduler.cluster.protocol.messages import Pull
from tests.engine.cluster.control_rig import FakeNode, make_coordinator, ref_of, until
from tests.engine.rpc.raw_http2 import PREFACE, SETTINGS, call, message, said_to
from transport.base import Address
from transport.control.security import Security

SECURITY = Security("the token of this cluster")
TOKEN = SECURITY.token
PATH = f"/{SERVICE}/{METHOD}"
HELLO = encoded(MemberHello(VERSION, "stranger", "node", 1, "stranger:1", "stranger:2"))
WRONG = {
    "none": (),
    "empty": ("",),
    "another": ("Bearer the token of another cluster",),
    "a part of it": (f"Bearer {TOKEN[:-1]}",),
    "more than it": (f"Bearer {TOKEN}x",),
    "without its scheme": (TOKEN,),
    "twice": (f"Bearer {TOKEN}", f"Bearer {TOKEN}"),
    "a wrong one too": (f"Bearer {TOKEN}", "Bearer x"),
    "a client's key": ("Bearer sk-of-a-client",),
}


@dataclass(slots=True)
class Port:
    """A coordinator behind its port, with one node that has joined."""

    number: int
    server: CoordinatorServer
    node: FakeNode
    client: ControlClient

    async def goes_on(self) -> None:
        """Check that the node is still led, and another one can join."""
        assert self.client.is_connected
        assert self.server.streams.keys() == {"n1"}
        other = _client(self.number, FakeNode("n2", {}))
        other.start()
        await until(lambda: "n2" in other.view.members and "n2" in self.client.view.members)
        await other.close()
        await until(lambda: self.server.streams.keys() == {"n1"})

    async def code_of(self, *frames: bytes, metadata: Metadata) -> grpc.StatusCode:
        """Say something over a stream of one's own, and return the status that it ends with."""
        async with grpc.aio.insecure_channel(f"127.0.0.1:{self.number}") as channel:
            opened: Any = channel.stream_stream(PATH)(metadata=metadata)
            with suppress(grpc.aio.AioRpcError):  # it may be refused while it speaks
                for frame in frames:
                    await opened.write(frame)
                await _end_of(opened)
            assert TOKEN not in str(await opened.details())
            return await opened.code()

    @asynccontextmanager
    async def stream(self, *frames: bytes) -> AsyncIterator[Any]:
        """Say something over a stream of one's own, with the token."""
        async with member_channel(f"127.0.0.1:{self.number}", SECURITY) as channel:
            opened: Any = channel.stream_stream(PATH)(metadata=call_metadata(SECURITY))
            for frame in frames:
                await opened.write(frame)
            yield opened
            opened.cancel()


async def _end_of(opened: Any) -> None:
    async with asyncio.timeout(60):
        while isinstance(await opened.read(), bytes):
            pass


def _client(port: int, node: FakeNode) -> ControlClient:
    name = node.agent.node
    hello = MemberHello(VERSION, name, "node", node.session, f"{name}:1", f"{name}:2", "", "w")
    connection = CoordinatorConnection(
        lambda: member_channel(f"127.0.0.1:{port}", SECURITY), call_metadata(SECURITY)
    )
    return ControlClient(hello, connection, ClusterView(), node.agent.report, node)


@asynccontextmanager
async def open_port(connections: int = 64) -> AsyncIterator[Port]:
    """Start a coordinator that one node has joined."""
    server = CoordinatorServer(make_coordinator, CatalogueFile(None, 1.8e9))
    members = MemberServer(SECURITY, [server.service()], connections)
    await server.start()
    address = await members.start(Address("127.0.0.1", 0))
    node = FakeNode("n1", {"a": 0})
    client = _client(address.port, node)
    client.start()
    try:
        await until(lambda: "n1" in client.view.members)
        yield Port(address.port, server, node, client)
    finally:
        await client.close()
        await server.close()
        await members.close()


@pytest.mark.parametrize("given", WRONG.values(), ids=WRONG.keys())
def test_without_the_token_nobody_joins(given: tuple[str, ...]) -> None:
    async def scenario() -> None:
        async with open_port() as port:
            metadata = tuple(("authorization", each) for each in given)
            assert await port.code_of(metadata=metadata) is grpc.StatusCode.UNAUTHENTICATED
            # A client that is refused while it speaks may lose the status: gRPC's core then calls it internal.
            refusals = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.INTERNAL)
            assert await port.code_of(HELLO, metadata=metadata) in refusals
            await port.goes_on()

    asyncio.run(scenario())


def test_a_flood_of_strangers_keeps_no_member_out_and_fills_no_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    wrong = [(b"authorization", b"Bearer nobody's")]
    joins = b"".join(
        call(PATH.encode(), wrong, 2 * at + 1) + message(HELLO, None, 2 * at + 1) for at in range(50)
    )
    no_text = b"".join(call(PATH.encode(), [(b"authorization", b"\xff")], 2 * at + 1) for at in range(50))

    async def scenario() -> None:
        async with open_port() as port:
            for said in (joins, no_text, call(b"/\xff"), b"\x00" * 500):
                for _ in range(5):
                    await asyncio.to_thread(said_to, port.number, PREFACE + SETTINGS + said, 0.1)
            await port.goes_on()

    asyncio.run(scenario())
    lines = [each.getMessage() for each in caplog.records if each.levelno > logging.INFO]
    assert len(lines) <= 12
    assert all(line.isprintable() and len(line) < 500 for line in lines)


def test_a_message_that_is_too_long_ends_its_own_stream(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with open_port() as port:
            code = await port.code_of(HELLO[:-1] + b"x" * (65 << 20), metadata=call_metadata(SECURITY))
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            await port.goes_on()

    asyncio.run(scenario())
    assert not any(record.exc_info for record in caplog.records)


def test_a_member_that_says_no_more_than_its_token_holds_a_stream_for_a_while_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(coordinator_server, "_HELLO_S", 0.2)

    async def scenario() -> None:
        async with open_port() as port, port.stream() as opened:
            await _end_of(opened)
            await port.goes_on()

    asyncio.run(scenario())


OF_ANOTHER_ROLE = {
    "a router reports as a node": ("router", encoded(Declares({"a": ""}))),
    "a router asks to leave": ("router", encoded(LeaveAsk(1))),
    "a node changes the catalogue": ("node", encoded(Ask(1, "remove", "a"))),
    "a router has a name resolved": ("router", encoded(Ask(1, "resolve", "a"))),
    "a hello comes twice": ("router", encoded(MemberHello(VERSION, "x", "router", 2))),
}


@pytest.mark.parametrize(("kind", "said"), OF_ANOTHER_ROLE.values(), ids=OF_ANOTHER_ROLE.keys())
def test_what_is_no_part_of_a_members_role_ends_its_stream_and_changes_nothing(
    kind: str, said: bytes
) -> None:
    async def scenario() -> None:
        async with open_port() as port:
            await until(lambda: "a" in port.client.view.catalogue)
            hello = encoded(MemberHello(VERSION, "x", "node" if kind == "node" else "router", 1, weights="w"))
            async with port.stream(hello, said) as opened:
                await _end_of(opened)
            await until(lambda: "x" not in port.server.streams)
            assert port.server.catalogue.entries.keys() == {"a"}
            await port.goes_on()

    asyncio.run(scenario())


def test_a_command_that_is_repeated_is_carried_out_once() -> None:
    node = FakeNode("n1", {})
    order = PullOrder(node.session, 1, WireAdapter.of(ref_of("a")), ("n2",))
    pull = Pull("n1", order.session, order.number, order.adapter.ref(), order.sources)
    node.agent.receive(pull)
    assert node.agent.receive(pull) == []


def test_a_hello_of_an_earlier_start_takes_nobodys_place() -> None:
    async def scenario() -> None:
        async with open_port() as port:
            replayed = encoded(MemberHello(VERSION, "n1", "node", 1, "evil:1", weights="w"))
            async with port.stream(replayed) as opened:
                assert b"TurnedAway" in await opened.read()
            assert port.client.view.members["n1"].address == "n1:1"
            await port.goes_on()

    asyncio.run(scenario())


def test_no_log_tells_the_token(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    async def scenario() -> None:
        async with open_port() as port:
            async with port.stream(b"\xff") as opened:
                await _end_of(opened)
            right = [(b"authorization", f"Bearer {TOKEN}".encode()), (b"x", b"\xff")]
            await asyncio.to_thread(said_to, port.number, PREFACE + SETTINGS + call(PATH.encode(), right))
            nearly = (("authorization", f"Bearer {TOKEN}, nearly"),)
            await port.code_of(HELLO, metadata=nearly)
            await port.goes_on()

    asyncio.run(scenario())
    assert caplog.records
    assert TOKEN not in caplog.text
