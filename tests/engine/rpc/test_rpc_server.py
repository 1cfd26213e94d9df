"""The gRPC door answers as HTTP does, for the same rules, and frees what a call held."""

import asyncio
import subprocess
import sys
from pathlib import Path

import aiohttp
import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from engine.config.access_config import AccessConfig
from engine.config.config import ServeConfig
from engine.rpc.wire import control_pb2, inference_pb2
from scripts.certificates import make_certificates
from tests.engine.rpc.door import Ask, Door, at_door, refusal

ROOT = Path(__file__).parents[3]


def reflected(address: str) -> list[str]:
    with grpc.insecure_channel(address) as channel:
        return list(ProtoReflectionDescriptorDatabase(channel).get_services())


def test_an_adapter_answers_as_over_http_and_whole_as_in_parts() -> None:
    async def scenario(door: Door) -> None:
        ask = Ask(text="hi", lora_name="poet", response={"output_token_ids": True, "output_logprobs": True})
        ask.stopping.max_new_tokens = 64
        whole = await door.generate(ask)
        parts = [part async for part in door.stream(ask)]
        body = {"model": "poet", "prompt": "hi", "max_tokens": 64, "return_token_ids": True, "logprobs": 0}
        async with aiohttp.ClientSession(door.http) as http:
            answer = await (await http.post("/v1/completions", json=body)).json()
        (choice,) = answer["choices"]
        assert whole.outputs.text == choice["text"] == "".join(part.outputs.text for part in parts)
        assert list(whole.outputs.token_ids) == choice["token_ids"]
        assert list(whole.outputs.logprobs) == pytest.approx(choice["logprobs"]["token_logprobs"])
        assert whole.outputs.finish_info == parts[-1].outputs.finish_info
        assert whole.outputs.finish_info.finish_reason == inference_pb2.FinishInfo.STOP
        assert [part.HasField("prompt_info") for part in parts] == [True] + [False] * (len(parts) - 1)
        assert whole.prompt_info.num_prompt_tokens == answer["usage"]["prompt_tokens"]

    at_door(scenario)


def test_the_protocols_defaults_and_decimals_reach_the_engine() -> None:
    async def scenario(door: Door) -> None:
        await door.generate(Ask(text="hi"))
        sampling = {"top_p": 0.7, "seed": 5}
        await door.generate(Ask(token_ids={"ids": [1, 2]}, temperature=0.3, sampling=sampling))
        (model, _, plain), (_, ids, drawn) = door.node.submitted
        assert (model, plain.temperature, plain.max_tokens, plain.top_p) == ("base", 0, 20, 1)
        assert (ids, drawn.temperature, drawn.top_p, drawn.seed) == ((1, 2), 0.3, 0.7, 5)

    at_door(scenario)


REFUSED = [
    (Ask(text="hi", lora_name="nobody"), "NOT_FOUND", "nobody"),
    (Ask(text="hi", model="other"), "NOT_FOUND", "other"),
    (Ask(text="hi", lora_name="base"), "NOT_FOUND", "base"),
    (Ask(), "INVALID_ARGUMENT", "prompt"),
    (Ask(text="hi", sampling={"num_sequences": 129}), "INVALID_ARGUMENT", "num_sequences"),
    (Ask(text="hi", temperature=-1), "INVALID_ARGUMENT", "temperature"),
    (Ask(text="hi", temperature=float("nan")), "INVALID_ARGUMENT", "temperature"),
    (Ask(text="hi", response={"output_candidates": {"all": True}}), "INVALID_ARGUMENT", "output_candidates"),
    (Ask(text="hi", stopping={"max_new_tokens": 4000}), "INVALID_ARGUMENT", "maximum context length"),
    (Ask(text="hi", priority=-1), "INVALID_ARGUMENT", "priority"),
    (Ask(text="hi", priority=1001), "INVALID_ARGUMENT", "priority"),
    (Ask(text="hi", kv={"cache_salt": "x" * 2000}), "INVALID_ARGUMENT", "cache_salt"),
    (Ask(text="hi", response={"logprobs_mode": "best"}), "INVALID_ARGUMENT", "logprobs_mode"),
    (Ask.FromString(b"\x1a\x02hi\x3a\x03\x5a\x01x"), "INVALID_ARGUMENT", "structural_tag"),
]


def test_what_cannot_be_honoured_is_refused_by_name() -> None:
    async def scenario(door: Door) -> None:
        for ask, code, word in REFUSED:
            found, details = await refusal(anext(aiter(door.stream(ask))))
            assert (found.name, word in details) == (code, True), (ask, found, details)
        assert not door.node.submitted

    at_door(scenario)


@pytest.mark.parametrize("leaves", ["cancels", "deadline"])
def test_a_client_that_leaves_frees_what_it_held(leaves: str) -> None:
    async def scenario(door: Door) -> None:
        door.node.gate.clear()
        call = door.stream(Ask(text="hi"), timeout=0.3 if leaves == "deadline" else None)
        await door.node.gate_reached.wait()
        if leaves == "cancels":
            call.cancel()
        await door.node.abort_seen.wait()
        assert not door.node.live

    at_door(scenario)


def test_keys_open_what_they_open_over_http() -> None:
    async def scenario(door: Door) -> None:
        ask, unload = Ask(text="hi"), control_pb2.UnloadLoraRequest(lora_name="poet")
        asking, admin = ((("authorization", f"Bearer {key}"),) for key in ("ask-key-1234", "admin-key-1234"))
        assert (await refusal(door.generate(ask)))[0] is grpc.StatusCode.UNAUTHENTICATED
        await door.generate(ask, metadata=asking)
        denied, _ = await refusal(door.control("UnloadLora", unload, metadata=asking))
        assert denied is grpc.StatusCode.PERMISSION_DENIED
        await door.control("UnloadLora", unload, metadata=admin)

    access = AccessConfig(api_keys=("ask-key-1234",), admin_keys=("admin-key-1234",))
    at_door(scenario, ServeConfig(access=access))


def test_adapters_are_loaded_listed_and_unloaded(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")

    async def scenario(door: Door) -> None:
        load = control_pb2.LoadLoraRequest(lora_name="new", source_path=str(folder))
        loaded = (await door.control("LoadLora", load)).adapter
        listed = (await door.control("ListLoras", control_pb2.ListLorasRequest())).adapters
        assert loaded in listed
        assert {each.lora_name for each in listed} == {"poet", "team/coder", "new"}
        assert len({each.lora_id for each in listed}) == 3
        assert all(each.lora_id > 0 and each.source_path for each in listed)
        assert (await refusal(door.control("LoadLora", load)))[0] is grpc.StatusCode.ALREADY_EXISTS
        outside = control_pb2.LoadLoraRequest(lora_name="other", source_path="/etc")
        code, details = await refusal(door.control("LoadLora", outside))
        assert (code, "source_path" in details) == (grpc.StatusCode.PERMISSION_DENIED, True)
        unload = control_pb2.UnloadLoraRequest(lora_name="new")
        assert (await door.control("UnloadLora", unload)).adapter == loaded
        assert (await refusal(door.control("UnloadLora", unload)))[0] is grpc.StatusCode.NOT_FOUND

    at_door(scenario, ServeConfig(lora_roots=(tmp_path,)))


def test_a_refusal_is_audited_before_the_client_hears_of_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(door: Door) -> None:
        outside = control_pb2.LoadLoraRequest(lora_name="other", source_path="/etc")
        await refusal(door.control("LoadLora", outside))
        (line,) = [each.getMessage() for each in caplog.records if each.name == "engine.audit"]
        assert '"action": "/vllm.Control/LoadLora"' in line
        assert '"outcome": "outside_roots"' in line

    with caplog.at_level("INFO", "engine.audit"):
        at_door(scenario, ServeConfig(lora_roots=(tmp_path,)))


def test_health_ends_with_the_drain_and_reflection_names_the_services() -> None:
    async def scenario(door: Door) -> None:
        assert [await door.health(name) for name in ("vllm.Inference", "vllm.Control")] == [1, 1]
        services = await asyncio.to_thread(reflected, door.address)
        assert {"vllm.Inference", "vllm.Control", "loraserve.Adapters", "grpc.health.v1.Health"} <= set(
            services
        )
        door.node.gate.clear()
        call = door.stream(Ask(text="hi"))
        await door.node.gate_reached.wait()
        door.stop.set()
        while await door.health() == health_pb2.HealthCheckResponse.SERVING:
            await asyncio.sleep(0)
        door.node.gate.set()
        assert [part async for part in call][-1].outputs.HasField("finish_info")

    at_door(scenario)


def test_health_follows_the_engine_in_time() -> None:
    async def scenario(door: Door) -> None:
        states = health_pb2.HealthCheckResponse
        for trouble, state in (("no node", states.NOT_SERVING), (None, states.SERVING)):
            door.node.trouble = trouble
            while await door.health() != state:
                await asyncio.sleep(0.01)

    at_door(scenario)


def test_tls_has_the_certificate_of_https(tmp_path: Path) -> None:
    authority, certificate, key = map(Path, make_certificates(tmp_path, ["127.0.0.1"]))

    async def scenario(door: Door) -> None:
        assert await door.health() == health_pb2.HealthCheckResponse.SERVING

    access = AccessConfig(tls_cert=certificate, tls_key=key)
    at_door(scenario, ServeConfig(access=access), authority.read_bytes())


def test_the_generated_code_is_what_protoc_makes(tmp_path: Path) -> None:
    sources = sorted((ROOT / "engine/rpc/wire").glob("*.proto"))
    names = [str(path.relative_to(ROOT)) for path in sources]
    where = [f"--proto_path={ROOT}", f"--python_out={tmp_path}", f"--pyi_out={tmp_path}"]
    # In a process of its own: the compiler and UCX's bindings cannot be loaded into one.
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *where, *names], check=True, timeout=60)
    made = sorted(tmp_path.rglob("*_pb2.py*"))
    assert len(made) == 2 * len(sources)
    for path in made:
        assert path.read_text() == (ROOT / path.relative_to(tmp_path)).read_text(), path.name
