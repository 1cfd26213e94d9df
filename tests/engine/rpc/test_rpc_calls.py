"""A call has an id: it is told, may be aborted by it, and has it alone. The server tells what it is, and shuts down."""

import asyncio
from typing import Any

import grpc
import pytest

from engine.config.access_config import AccessConfig
from engine.config.cluster_config import ClusterConfig
from engine.config.config import EngineConfig, ServeConfig
from engine.errors import Overloaded
from engine.rpc.rpc_guard import REQUEST_ID, RETRY_AFTER
from engine.rpc.wire import control_pb2, inference_pb2
from tests.engine.rpc.door import Ask, Door, at_door, refusal
from transport.base import Address

Finish = inference_pb2.FinishInfo


def bearing(key: str) -> dict[str, Any]:
    return {"metadata": (("authorization", f"Bearer {key}"),)}


async def told_id(call: Any) -> str:
    return dict(await call.initial_metadata())[REQUEST_ID]


async def abort(door: Door, *ids: str, **how: Any) -> None:
    await door.control("Abort", control_pb2.AbortRequest(request_ids=ids), **how)


def test_every_sequence_of_a_whole_answer_is_told() -> None:
    async def scenario(door: Door) -> None:
        ask = Ask(text="hi", sampling={"num_sequences": 3}, response={"output_token_ids": True})
        whole = await door.generate(ask)
        outputs = [whole.outputs, *whole.further_outputs]
        assert [each.index for each in outputs] == [0, 1, 2]
        assert {each.text for each in outputs} == {"base heard hi"}
        assert all(each.finish_info.num_output_tokens == len(each.token_ids) == 14 for each in outputs)

    at_door(scenario)


@pytest.mark.parametrize("given", ["", "mine/1"])
def test_an_aborted_stream_ends_with_what_it_has(given: str) -> None:
    async def scenario(door: Door) -> None:
        door.node.gate_after = 3
        door.node.gate.clear()
        call = door.stream(Ask(text="hi", request_id=given, sampling={"num_sequences": 2}))
        request_id = await told_id(call)
        assert request_id == given or (not given and len(request_id) == 32)
        await door.node.gate_reached.wait()
        await abort(door, request_id)
        parts = [part.outputs async for part in call]
        assert "".join(part.text for part in parts) == "bbaa"
        ended = [part for part in parts if part.HasField("finish_info")]
        assert [(part.index, part.finish_info.finish_reason) for part in ended] == [
            (0, Finish.ABORTED), (1, Finish.ABORTED)
        ]  # fmt: skip
        assert [part.finish_info.num_output_tokens for part in ended] == [2, 2]
        assert not door.node.live
        assert (await refusal(abort(door, request_id)))[0] is grpc.StatusCode.NOT_FOUND

    at_door(scenario)


def test_an_aborted_whole_answer_has_what_was_generated() -> None:
    async def scenario(door: Door) -> None:
        door.node.gate_after = 3
        door.node.gate.clear()
        call = asyncio.create_task(door.generate(Ask(text="hi", request_id="mine")))
        await door.node.gate_reached.wait()
        await abort(door, "mine")
        answer = await call
        assert (answer.outputs.text, answer.outputs.finish_info.finish_reason) == ("ba", Finish.ABORTED)

    at_door(scenario)


def test_what_waits_for_its_adapter_is_aborted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(door: Door) -> None:
        submitting, forever = asyncio.Event(), asyncio.Event()

        async def submit(*request: Any) -> Any:
            submitting.set()
            await forever.wait()

        monkeypatch.setattr(door.node, "submit_all", submit)
        call = door.stream(Ask(text="hi", request_id="mine"))
        await submitting.wait()
        await abort(door, "mine")
        assert [part.outputs.finish_info.finish_reason async for part in call] == [Finish.ABORTED]

    at_door(scenario)


def test_of_several_ids_those_that_are_not_live_are_named_and_the_others_aborted() -> None:
    async def scenario(door: Door) -> None:
        door.node.gate.clear()
        call = door.stream(Ask(text="hi", request_id="mine"))
        await told_id(call)
        code, details = await refusal(abort(door, "gone", "mine", "lost"))
        assert (code, "'gone', 'lost'" in details, "mine" in details) == (
            grpc.StatusCode.NOT_FOUND,
            True,
            False,
        )
        assert [part.outputs.finish_info.finish_reason async for part in call] == [Finish.ABORTED]
        await abort(door)

    at_door(scenario)


def test_an_id_that_is_live_is_refused_and_free_again_after_its_end() -> None:
    async def scenario(door: Door) -> None:
        ask = Ask(text="hi", request_id="mine")
        door.node.gate.clear()
        call = door.stream(ask)
        await told_id(call)
        code, details = await refusal(door.generate(ask))
        assert (code, "request_id: 'mine'" in details) == (grpc.StatusCode.ALREADY_EXISTS, True)
        door.node.gate.set()
        assert [part async for part in call]
        assert (await door.generate(ask)).outputs.text == "base heard hi"

    at_door(scenario)


def test_an_id_that_a_proxy_gives_twice_is_told_and_refused_never() -> None:
    async def scenario(door: Door) -> None:
        door.node.gate.clear()
        calls = [door.stream(Ask(text="hi"), metadata=((REQUEST_ID, "trace-1"),)) for _ in range(2)]
        assert [await told_id(call) for call in calls] == ["trace-1"] * 2
        door.node.gate.set()
        for call in calls:
            assert [part async for part in call]

    at_door(scenario)


def test_an_id_belongs_to_the_key_that_gave_it() -> None:
    async def scenario(door: Door) -> None:
        ours, theirs = bearing("ask-key-1234"), bearing("ask-key-5678")
        door.node.gate.clear()
        calls = [door.stream(Ask(text="hi", request_id="same"), **key) for key in (ours, theirs)]
        assert [await told_id(call) for call in calls] == ["same", "same"]
        await abort(door, "same", **theirs)
        assert [part.outputs.finish_info.finish_reason async for part in calls[1]] == [Finish.ABORTED]
        assert (await refusal(abort(door, "same", **theirs)))[0] is grpc.StatusCode.NOT_FOUND
        door.node.gate.set()
        *_, last = [part async for part in calls[0]]
        assert last.outputs.finish_info.finish_reason == Finish.STOP

    at_door(scenario, ServeConfig(access=AccessConfig(api_keys=("ask-key-1234", "ask-key-5678"))))


@pytest.mark.parametrize("wrong", ["a b", "é", "x" * 129, "a\nb"])
def test_an_id_that_no_log_may_hold_is_refused(wrong: str) -> None:
    async def scenario(door: Door) -> None:
        code, details = await refusal(door.generate(Ask(text="hi", request_id=wrong)))
        assert (code, "request_id" in details) == (grpc.StatusCode.INVALID_ARGUMENT, True)

    at_door(scenario)


def test_a_refusal_tells_the_id_and_when_to_come_again() -> None:
    async def scenario(door: Door) -> None:
        door.node.refusal = Overloaded(9, 8, 3)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await door.generate(Ask(text="hi", request_id="mine"))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        told = dict(caught.value.trailing_metadata())
        assert (told[REQUEST_ID], told[RETRY_AFTER]) == ("mine", "3")

    at_door(scenario)


def test_the_server_tells_its_limits() -> None:
    async def scenario(door: Door) -> None:
        info = await door.control("GetServerInfo", control_pb2.GetServerInfoRequest())
        assert (info.api_version, info.max_model_len, info.kv_block_size) == ("vllm", 512, 8)
        assert (info.total_kv_blocks, info.max_running_requests, info.max_batched_tokens) == (6, 5, 99)
        assert info.max_loras == 5
        assert info.parallelism.tensor_parallel_size == info.parallelism.world_size == 1
        assert info.engine_version
        assert not info.rl_capabilities.sleep_mode_enabled

    engine = EngineConfig(block_size=8, max_num_seqs=5, max_num_batched_tokens=99)
    at_door(scenario, ServeConfig(engine=engine))


def test_a_router_tells_how_many_adapters_may_be_asked_for_at_once() -> None:
    async def scenario(door: Door) -> None:
        info = await door.control("GetServerInfo", control_pb2.GetServerInfoRequest())
        assert (info.max_loras, info.max_running_requests, info.total_kv_blocks) == (7, 0, 0)

    at_door(
        scenario,
        ServeConfig(cluster=ClusterConfig(role="router", coordinator=Address("127.0.0.1", 1)), max_waiting=7),
    )


def test_no_source_of_kv_events_is_named_to_clients_that_ask_before_they_begin() -> None:
    async def scenario(door: Door) -> None:
        answer = await door.control("GetKvEventSources", control_pb2.GetKvEventSourcesRequest())
        assert answer.SerializeToString() == b""

    at_door(scenario)


def test_shutdown_is_for_admins_and_drains_what_runs() -> None:
    async def scenario(door: Door) -> None:
        ours, admin = bearing("ask-key-1234"), bearing("admin-key-1234")
        door.node.gate.clear()
        door.node.drained_by = lambda: None  # what runs goes on: the server can still be asked
        call = door.stream(Ask(text="hi"), **ours)
        await told_id(call)
        denied, _ = await refusal(door.control("Shutdown", control_pb2.ShutdownRequest(), **ours))
        assert (denied, door.stop.is_set()) == (grpc.StatusCode.PERMISSION_DENIED, False)
        await door.control("Shutdown", control_pb2.ShutdownRequest(), **admin)
        while await door.health() == 1:
            await asyncio.sleep(0)
        door.node.gate.set()
        *_, last = [part async for part in call]
        assert last.outputs.finish_info.finish_reason == Finish.STOP

    access = AccessConfig(api_keys=("ask-key-1234",), admin_keys=("admin-key-1234",))
    at_door(scenario, ServeConfig(access=access))


def test_only_rank_0_is_here() -> None:
    async def scenario(door: Door) -> None:
        await door.generate(Ask(text="hi"), metadata=(("x-data-parallel-rank", "0"),))
        for wrong in ("1", "-0", "zero"):
            call = door.generate(Ask(text="hi"), metadata=(("x-data-parallel-rank", wrong),))
            code, details = await refusal(call)
            assert (code, "x-data-parallel-rank" in details) == (grpc.StatusCode.INVALID_ARGUMENT, True)

    at_door(scenario)
