"""Whatever comes over gRPC, and however it leaves, nothing of it is left in the engine."""

import asyncio
import random
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from engine.api.keys import AccessRules, Permission
from engine.async_engine import AsyncEngine
from engine.config.config import ServeConfig
from engine.config.http_config import HttpConfig
from engine.metrics.request_log import RequestLog
from engine.metrics.telemetry import Telemetry
from engine.rpc.bounded_server import BoundedServer, RpcBounds
from engine.rpc.rpc_guard import RpcCall, RpcGuard, RpcMethod
from engine.rpc.wire import control_pb2, inference_pb2
from tests.engine.rig import Rig, build, is_clean
from tests.engine.rpc.cancel_storm import cancel_many
from tests.engine.rpc.door import Ask, RpcDoor, refusal, served

GENERATE, STREAM = "/vllm.Inference/Generate", "/vllm.Inference/GenerateStream"
HARMLESS = {
    "OK",
    "INVALID_ARGUMENT",
    "NOT_FOUND",
    "RESOURCE_EXHAUSTED",
    "PERMISSION_DENIED",
    "ALREADY_EXISTS",
}
WHOLE = Ask(
    text="hi there", request_id="mine", temperature=0.5, lora_name="low",
    sampling={"num_sequences": 2, "top_k": 5, "seed": 3}, decoding={"logit_bias": {5: 1.5}},
    stopping={"max_new_tokens": 5, "stop_strings": ["zz"]}, response={"output_candidates": {"top_n": 2}},
)  # fmt: skip


def at_engine(
    folder: Path, scenario: Callable[[RpcDoor, Rig], Awaitable[None]], http: HttpConfig | None = None
) -> None:
    """Run a scenario before a real engine of a fake model; afterwards nothing of any request may be left."""

    async def run() -> None:
        rig = build(folder)
        engine = AsyncEngine(rig.engine, Telemetry(), 64)
        config = ServeConfig(max_waiting=64, http=http or HttpConfig(), lora_roots=(folder,))
        async with served(engine, config) as found:
            await asyncio.wait_for(scenario(RpcDoor(*found), rig), 60)
            rig.executor.gate.set()
            while not is_clean(rig.engine):
                await asyncio.sleep(0.01)
            assert engine.stats().running == engine.stats().waiting == 0
        assert is_clean(rig.engine)

    asyncio.run(run())


async def code_of(call: Awaitable[Any]) -> str:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


def spoilt(chance: random.Random, sent: bytes) -> bytes:
    """Change, drop, double or add a few bytes."""
    spoilt = bytearray(sent)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(spoilt))
        match chance.randrange(4):
            case 0:
                spoilt[at] = chance.randrange(256)
            case 1:
                del spoilt[at + 1 :]
            case 2:
                spoilt[at:at] = spoilt[: chance.randrange(16)]
            case _:
                spoilt.insert(at, chance.randrange(256))
    return bytes(spoilt)


def test_spoilt_messages_are_answered_or_refused_and_never_a_failure(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(door: RpcDoor, rig: Rig) -> None:
        chance, codes = random.Random(7), set[str]()
        load = control_pb2.LoadLoraRequest(lora_name="new", source_path=str(rig.folders["high"]))
        for _ in range(100):
            sent = [spoilt(chance, WHOLE.SerializeToString()) for _ in range(6)]
            calls = [code_of(door.channel.unary_unary(GENERATE)(each)) for each in sent]
            calls.append(code_of(door.channel.unary_unary("/vllm.Control/LoadLora")(
                spoilt(chance, load.SerializeToString())
            )))  # fmt: skip
            codes.update(await asyncio.gather(*calls))
        assert "INVALID_ARGUMENT" in codes
        assert codes <= HARMLESS

    at_engine(tmp_path, scenario)
    assert [each for each in caplog.records if each.levelname == "ERROR"] == []


def test_thousands_of_calls_that_are_cancelled_leave_nothing(tmp_path: Path) -> None:
    async def scenario(door: RpcDoor, rig: Rig) -> None:
        ask = Ask(token_ids={"ids": [7, 8]}, stopping={"max_new_tokens": 100})
        await cancel_many(door.address, STREAM, ask.SerializeToString())
        assert (await door.generate(ask)).outputs.num_tokens == 100

    at_engine(tmp_path, scenario)


def test_deadlines_that_have_passed_leave_nothing(tmp_path: Path) -> None:
    async def scenario(door: RpcDoor, rig: Rig) -> None:
        rig.executor.gate.clear()
        ask = Ask(token_ids={"ids": [7, 8]}, stopping={"max_new_tokens": 100})
        calls = [code_of(door.generate(ask, timeout=left)) for left in (0, 0.001, 0.05) for _ in range(16)]
        assert set(await asyncio.gather(*calls)) == {"DEADLINE_EXCEEDED"}

    at_engine(tmp_path, scenario)


def test_aborts_amid_the_steps_leave_nothing(tmp_path: Path) -> None:
    async def scenario(door: RpcDoor, rig: Rig) -> None:
        rig.executor.gate.clear()
        names = [f"r{number}" for number in range(32)]
        asks = [
            Ask(token_ids={"ids": [7, 8]}, request_id=name, stopping={"max_new_tokens": 20}) for name in names
        ]
        calls = [door.stream(ask) for ask in asks]
        for call in calls:
            await call.initial_metadata()
        aborts = control_pb2.AbortRequest(request_ids=names[::2])
        await door.control("Abort", aborts)
        rig.executor.gate.set()
        reasons: list[int] = []
        for call in calls:
            *_, last = [part async for part in call]
            reasons.append(last.outputs.finish_info.finish_reason)
        finish = inference_pb2.FinishInfo
        assert reasons == [finish.ABORTED, finish.LENGTH] * 16

    at_engine(tmp_path, scenario)


def test_a_message_that_is_too_large_is_refused_also_when_it_comes_compressed(tmp_path: Path) -> None:
    async def scenario(door: RpcDoor, rig: Rig) -> None:
        large = Ask(text="a" * (1 << 20))
        async with grpc.aio.insecure_channel(door.address, compression=grpc.Compression.Gzip) as compressing:
            for channel in (door.channel, compressing):
                call = channel.unary_unary(GENERATE)(large.SerializeToString())
                code, details = await refusal(call)
                assert (code, "larger than max" in details) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)

    at_engine(tmp_path, scenario, HttpConfig(max_body_bytes=1 << 16))


def test_connections_beyond_the_limit_and_those_that_say_nothing_are_closed(tmp_path: Path) -> None:
    async def scenario(door: RpcDoor, rig: Rig) -> None:
        host, _, port = door.address.rpartition(":")
        silent = [await asyncio.open_connection(host, int(port)) for _ in range(8)]
        ends = [asyncio.ensure_future(reader.read()) for reader, _ in silent]
        await asyncio.wait(ends)
        for _, writer in silent:
            writer.close()
        assert (await door.generate(Ask(text="hi"))).outputs.num_tokens == 20

    at_engine(tmp_path, scenario, HttpConfig(max_connections=4, header_timeout_s=0.3))


def test_a_client_that_reads_nothing_is_given_up() -> None:
    async def scenario() -> None:
        ended = asyncio.Event()

        async def answers(message: Any, call: RpcCall) -> AsyncGenerator[Any, None]:
            try:
                while True:
                    yield inference_pb2.GenerateResponse(outputs={"text": "x" * (1 << 16)})
            finally:
                ended.set()

        guard = RpcGuard(AccessRules(), RequestLog(), 0.2)
        server = BoundedServer(RpcBounds(8, 5.0, 60.0, 1 << 20))
        method = RpcMethod("GenerateStream", Permission.ASK, Ask, answers)
        server.add(guard.service("vllm.Inference", [method]))
        port = server.server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_stream(STREAM)(b"")
            assert await call.read()
            await asyncio.wait_for(ended.wait(), 30)
        await server.stop(0.0)

    asyncio.run(scenario())
