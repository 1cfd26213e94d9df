"""A gRPC door before a fake engine, and how tests speak through it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, cast

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from engine.api.base import EngineClient
from engine.config.config import ServeConfig
from engine.rpc.wire import control_pb2, inference_pb2
from engine.serve import serve
from engine.tokenizer import Tokenizer
from tests.fakes.engine_client import FakeClient
from tests.fakes.tokenizers import byte_tokenizer

CODEC = Tokenizer(byte_tokenizer())
Ask = inference_pb2.GenerateRequest


class RpcDoor:
    """A server's gRPC port."""

    def __init__(self, channel: grpc.aio.Channel, address: str, http: str, stop: asyncio.Event) -> None:
        self.channel, self.address, self.http, self.stop = channel, address, http, stop

    async def generate(self, ask: Ask, **how: Any) -> inference_pb2.GenerateResponse:
        return await self._call("Inference/Generate", ask, inference_pb2.GenerateResponse, how)

    def stream(self, ask: Ask, **how: Any) -> Any:
        method = self.channel.unary_stream(
            "/vllm.Inference/GenerateStream",
            request_serializer=Ask.SerializeToString,
            response_deserializer=inference_pb2.GenerateResponse.FromString,
        )
        return method(ask, **how)

    async def control(self, name: str, message: Any, **how: Any) -> Any:
        service = control_pb2.DESCRIPTOR.services_by_name["Control"]
        answer = getattr(control_pb2, service.methods_by_name[name].output_type.name)
        return await self._call(f"Control/{name}", message, answer, how)

    async def health(self, service: str = "vllm.Inference") -> int:
        stub = cast(Any, health_pb2_grpc).HealthStub(self.channel)
        return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status

    async def _call(self, path: str, message: Any, answer: Any, how: dict[str, Any]) -> Any:
        method = self.channel.unary_unary(
            f"/vllm.{path}",
            request_serializer=type(message).SerializeToString,
            response_deserializer=answer.FromString,
        )
        return await method(message, **how)


class Door(RpcDoor):
    """The port of a server whose engine is `node`."""

    def __init__(
        self, channel: grpc.aio.Channel, address: str, http: str, stop: asyncio.Event, node: FakeClient
    ) -> None:
        super().__init__(channel, address, http, stop)
        self.node = node


@asynccontextmanager
async def served(
    client: EngineClient, config: ServeConfig, ca: bytes | None = None
) -> AsyncIterator[tuple[grpc.aio.Channel, str, str, asyncio.Event]]:
    """Serve an engine at free ports: a channel, its address, that of HTTP, and what stops the server."""
    stop, told = asyncio.Event(), asyncio.Queue[str]()
    chosen = replace(config, port=0, grpc_port=0)
    server = asyncio.create_task(serve(client, chosen, told.put_nowait, stop))
    http, _, rpc = (await told.get()).partition(" and ")
    address = rpc.removeprefix("grpc://")
    secure = ca and grpc.ssl_channel_credentials(ca)
    channel = grpc.aio.secure_channel(address, secure) if secure else grpc.aio.insecure_channel(address)
    try:
        async with channel:
            yield channel, address, http, stop
    finally:
        stop.set()
        await server


def at_door(
    scenario: Callable[[Door], Awaitable[None]], config: ServeConfig | None = None, ca: bytes | None = None
) -> None:
    """Run a scenario before a fake engine; afterwards nothing of any request may be left."""

    async def run() -> None:
        node = FakeClient(CODEC)
        node.drained_by = node.gate.set
        async with served(node, config or ServeConfig(), ca) as found:
            await asyncio.wait_for(scenario(Door(*found, node)), 30)
        assert not node.live

    asyncio.run(run())


async def refusal(call: Awaitable[Any]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or ""
