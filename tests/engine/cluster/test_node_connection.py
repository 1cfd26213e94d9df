"""A router's end of a link closes at once, whatever comes over it at that moment."""

import asyncio
from typing import Any, cast

import grpc

from engine.cluster.link.link_messages import METHOD, SERVICE, VERSION, LoadTold, NodeReady, OpenLink, encoded
from engine.cluster.link.node_connection import NodeConnection
from engine.cluster.trusted_channels import MemberServer
from engine.cluster.view import Member
from engine.rpc.bounded_server import RpcService
from scheduler.cluster.cost.model import StepLoad
from scheduler.cluster.routing.base import NodeLoad
from tests.engine.cluster.live_nodes import SECURITY
from transport.base import Address

CLOSINGS, ENOUGH_S = 40, 10.0


class Listener:
    """Notes how often a link was made and lost, and how much came over it."""

    def __init__(self) -> None:
        self.made = self.lost_ = self.messages = 0
        self.chatted = asyncio.Event()

    def connected(self, node: str, ready: NodeReady) -> None:
        """Count a link."""
        self.made += 1

    def told(self, node: str, message: object) -> None:
        """Count a message."""
        self.messages += 1
        self.chatted.set()

    def lost(self, node: str) -> None:
        """Count a link that ended."""
        self.lost_ += 1


async def _chatter(_incoming: object, context: Any) -> None:
    """Play a node that never stops talking."""
    await context.write(encoded(NodeReady(VERSION, "n0", 1, 256, 256, (0,), "0" * 64)))
    frame = encoded(LoadTold(NodeLoad(0, StepLoad((), 0))))
    while True:
        await context.write(frame)


def test_a_link_closes_while_messages_stream_in() -> None:
    async def visit() -> None:
        method = cast(Any, grpc).stream_stream_rpc_method_handler(_chatter)
        server = MemberServer(SECURITY, [RpcService(SERVICE, {METHOD: method})])
        address = await server.start(Address("127.0.0.1", 0))
        listener = Listener()
        for start in range(CLOSINGS):
            connection = NodeConnection(
                Member("n0", 1, str(address)), OpenLink(VERSION, "router", start), SECURITY, listener
            )
            connection.start()
            async with asyncio.timeout(ENOUGH_S):
                await listener.chatted.wait()
            closing = asyncio.create_task(connection.close())
            done, _ = await asyncio.wait({closing}, timeout=ENOUGH_S)
            assert done, f"closing {start} waits forever"
            listener.chatted.clear()
        assert listener.made == listener.lost_ == CLOSINGS
        await server.close()

    asyncio.run(visit())
