"""Let whoever starts and ends nodes ask the coordinator how many there should be, over a gRPC call of its own.

It is no member: it reports nothing and follows no view. It trusts, and is trusted, as members are.
"""

import logging
import time
from collections.abc import Mapping
from typing import Annotated, Any, cast

import grpc
import grpc.aio
import msgspec

from engine.cluster.control.control_messages import VERSION
from engine.cluster.control.control_values import ControlMessage, LargerThanZero, Text
from engine.cluster.trusted_channels import call_metadata, member_channel
from engine.config.launch_config import LaunchConfig
from engine.config.node_range import NodeRange
from engine.rpc.bounded_server import RpcService
from scheduler.cluster.coordinator.cluster_size import ClusterSize
from scheduler.cluster.coordinator.size_keeper import SizeBounds, SizeReason
from transport.base import Count
from transport.control.security import Security

SERVICE, METHOD = "loraserve.Size", "Ask"
_ANSWER_S = 5.0
_REASONS: Mapping[SizeReason, str] = {
    "start": "as many ran when this coordinator began",
    "bounds": "the bounds allow no other",
    "load": "fewer would be too busy to answer in time",
    "memory": "fewer have no room for the adapters that are asked for",
    "refused": "fewer have refused requests again and again",
    "calm": "one more was not needed for long enough",
}
_log = logging.getLogger(__name__)
Patience = Annotated[float, msgspec.Meta(ge=0, le=1e9)]


class SizeAsk(ControlMessage, frozen=True):
    """Between which numbers to choose, how patiently, and how many nodes run."""

    version: Count
    lowest: LargerThanZero
    highest: LargerThanZero
    grow_after_s: Patience
    shrink_after_s: Patience
    running: Count

    @classmethod
    def of(cls, nodes: NodeRange, launch: LaunchConfig) -> "SizeAsk":
        """Return what an operator's choice asks while no node runs."""
        return cls(VERSION, nodes.lowest, nodes.highest, launch.grow_after_s, launch.shrink_after_s, 0)

    def with_running(self, running: int) -> "SizeAsk":
        """Return the same ask while so many nodes run."""
        return msgspec.structs.replace(self, running=running)

    @property
    def bounds(self) -> SizeBounds:
        """Return the bounds."""
        return SizeBounds(self.lowest, max(self.lowest, self.highest), self.grow_after_s, self.shrink_after_s)


class SizeTold(ControlMessage, frozen=True):
    """So many nodes are wanted, and why that number was chosen last."""

    wanted: LargerThanZero
    reason: Text


def size_service(size: ClusterSize) -> RpcService:
    """Return what a coordinator's gRPC server is to serve; the log is told of each change."""

    async def answer(frame: bytes, context: Any) -> bytes:
        try:
            ask = msgspec.msgpack.decode(frame, type=SizeAsk)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            return await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"no message: {error}")
        if ask.version != VERSION:
            told = f"version {ask.version} meets {VERSION} at the coordinator: update the older one"
            return await context.abort(grpc.StatusCode.FAILED_PRECONDITION, told)
        before = size.told
        now = size.ask(ask.bounds, ask.running, time.monotonic())
        reason = _REASONS[now.last.reason]
        if before is not None and before.wanted != now.wanted:
            _log.info("%d nodes are wanted rather than %d: %s", now.wanted, before.wanted, reason)
        return msgspec.msgpack.encode(SizeTold(now.wanted, reason))

    return RpcService(SERVICE, {METHOD: cast(Any, grpc).unary_unary_rpc_method_handler(answer)})


async def ask_size(coordinator: str, security: Security, ask: SizeAsk) -> SizeTold | None:
    """Ask once; None if no coordinator answers, which is to mean that nothing is to change."""
    try:
        channel = member_channel(coordinator, security)
        async with channel:
            call = cast(Any, channel).unary_unary(f"/{SERVICE}/{METHOD}")
            frame = await call(
                msgspec.msgpack.encode(ask), timeout=_ANSWER_S, metadata=call_metadata(security)
            )
        return msgspec.msgpack.decode(frame, type=SizeTold)
    except (grpc.aio.BaseError, grpc.RpcError, msgspec.MsgspecError) as error:
        told = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)
        _log.info("the coordinator does not say how many nodes are wanted: %s", told)
        return None
