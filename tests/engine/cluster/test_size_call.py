"""A launcher asks the coordinator how many nodes there should be; strangers and nonsense get no answer."""

import asyncio
from collections.abc import Awaitable, Callable
from types import MappingProxyType
from typing import Any, cast

import grpc
import msgspec
import pytest

from engine.cluster.control.control_messages import VERSION
from engine.cluster.size_call import METHOD, SERVICE, SizeAsk, ask_size, size_service
from engine.cluster.trusted_channels import MemberServer, call_metadata, member_channel
from engine.config.launch_config import LaunchConfig
from engine.config.node_range import NodeRange
from scheduler.cluster.coordinator.cluster_size import ClusterSize
from scheduler.cluster.coordinator.node_need import NodeNeed
from scheduler.cluster.cost.model import Kernel
from scheduler.cluster.placement.base import Problem, Utilisation
from scheduler.cluster.placement.baselines import HashedPlacement
from scheduler.cluster.state import EMPTY_PLACEMENT, Demand, NodeState, OperatingPoints
from transport.base import Address
from transport.control.security import Security

SECURITY = Security("a-token-of-sixteen")
POINTS = OperatingPoints((8, 64), (1000.0, 500.0))
ASK = SizeAsk.of(NodeRange(2, 5), LaunchConfig(grow_after_s=1.0))


def problem(now: float) -> Problem:
    """One node, and nobody asks for anything."""
    node = NodeState("n0", 1 << 30, POINTS)
    return Problem(Demand(MappingProxyType({})), (node,), EMPTY_PLACEMENT)


def asked(scenario: Callable[[str, ClusterSize], Awaitable[None]]) -> None:
    """Run a scenario beside a server at an address."""

    async def main() -> None:
        size = ClusterSize(problem, NodeNeed(HashedPlacement(), Utilisation(Kernel.EXACT)))
        server = MemberServer(SECURITY, [size_service(size)])
        address = await server.start(Address("127.0.0.1", 0))
        try:
            await scenario(str(address), size)
        finally:
            await server.close()

    asyncio.run(main())


def test_the_answer_is_a_number_within_bounds_and_its_reason() -> None:
    async def scenario(address: str, size: ClusterSize) -> None:
        told = await ask_size(address, SECURITY, ASK.with_running(4))
        assert told is not None
        assert (told.wanted, told.reason) == (4, "as many ran when this coordinator began")
        fewer = SizeAsk.of(NodeRange(1, 3), LaunchConfig()).with_running(4)
        told = await ask_size(address, SECURITY, fewer)
        assert told is not None
        assert (told.wanted, told.reason) == (3, "the bounds allow no other")
        assert size.told is not None
        assert size.told.present == 1

    asked(scenario)


def test_where_no_coordinator_answers_or_does_not_trust_there_is_no_number() -> None:
    async def scenario(address: str, size: ClusterSize) -> None:
        assert await ask_size(address, Security("another-token-of-sixteen"), ASK) is None
        assert await ask_size("127.0.0.1:1", SECURITY, ASK) is None
        assert size.told is None

    asked(scenario)


OLDER = msgspec.msgpack.encode(msgspec.structs.replace(ASK, version=VERSION - 1))


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (b"", grpc.StatusCode.INVALID_ARGUMENT),
        (b"\x91\xa7SizeAsk", grpc.StatusCode.INVALID_ARGUMENT),
        (OLDER, grpc.StatusCode.FAILED_PRECONDITION),
    ],
)
def test_what_means_nothing_is_refused(frame: bytes, code: grpc.StatusCode) -> None:
    async def scenario(address: str, size: ClusterSize) -> None:
        async with member_channel(address, SECURITY) as channel:
            call = cast(Any, channel).unary_unary(f"/{SERVICE}/{METHOD}")
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call(frame, metadata=call_metadata(SECURITY), timeout=10)
        assert refused.value.code() == code
        assert size.told is None

    asked(scenario)
