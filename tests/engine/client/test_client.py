"""The clients speak every call, give typed values, and raise what the server refuses as errors of their own."""

import asyncio
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from engine.client import AsyncClient, CallFailed, Client
from engine.config.access_config import AccessConfig
from engine.config.config import ServeConfig
from scheduler.request import InvalidParameter, SamplingParams
from scheduler.structured_outputs import StructuredOutputsParams
from scripts.certificates import make_certificates
from tests.engine.rpc.door import Door, at_door
from tests.engine.rpc.test_rpc_adapters import adapter_folder

LONG = SamplingParams(temperature=0, max_tokens=64)


def with_client(visit: Callable[[Client], None], config: ServeConfig | None = None, **how: object) -> None:
    """Run `visit` in a thread, with a client of a fake engine."""

    async def scenario(door: Door) -> None:
        def run() -> None:
            with Client(door.address, timeout_s=30, **how) as client:
                visit(client)

        await asyncio.to_thread(run)

    at_door(scenario, config)


def test_a_whole_answer_has_every_sequence_and_its_tokens() -> None:
    def visit(client: Client) -> None:
        params = SamplingParams(n=2, max_tokens=64, logprobs=0, stop=["ear"])
        first, second = client.generate("hi", params, adapter="poet")
        assert (first.index, second.index) == (0, 1)
        assert (first.text, first.ending, first.stop) == ("poet h", "stop", "ear")
        assert len(first.token_ids) == len(first.logprobs) > 0

    with_client(visit)


def test_a_stream_joins_to_the_whole() -> None:
    def visit(client: Client) -> None:
        parts = list(client.stream([104, 105], LONG))
        (whole,) = client.generate([104, 105], LONG)
        assert len(parts) > 1
        assert "".join(part.text for part in parts) == whole.text
        assert [part.ending for part in parts] == [None] * (len(parts) - 1) + ["stop"]

    with_client(visit)


def test_what_a_request_asks_for_beside_its_answer_reaches_the_engine() -> None:
    async def scenario(door: Door) -> None:
        form = StructuredOutputsParams(choice=("poet heard hi", "no"))
        params = replace(LONG, logprobs=0, logprobs_mode="processed_logprobs", structured_outputs=form)
        terms = {"priority": 7, "cache_salt": "mine"}
        async with AsyncClient(door.address, timeout_s=30) as client:
            (whole,) = await client.generate("hi", params, "poet", **terms)
            parts = [part async for part in client.stream("hi", params, "poet", **terms)]
            (base,) = await client.generate("hi", LONG)
            with pytest.raises(InvalidParameter, match="priority"):
                await client.generate("hi", LONG, priority=1 << 40)
        assert (door.node.priorities, door.node.salts) == ([7, 7, 0], ["mine", "mine", ""])
        asked = [(each.structured_outputs, each.logprobs_mode) for _, _, each in door.node.submitted[:2]]
        assert asked == [(form, "processed_logprobs")] * 2
        assert (whole.version, parts[0].version, base.version) == ("digest-of-poet", "digest-of-poet", None)
        assert [part.version for part in parts[1:]] == [None] * (len(parts) - 1)

    at_door(scenario)


def test_what_the_server_refuses_has_its_code_and_words() -> None:
    def visit(client: Client) -> None:
        with pytest.raises(CallFailed, match="nobody") as caught:
            client.generate("hi", LONG, adapter="nobody", request_id="mine")
        assert (caught.value.code, caught.value.request_id) == ("NOT_FOUND", "mine")
        with pytest.raises(CallFailed, match="nobody"):
            list(client.stream("hi", LONG, adapter="nobody"))
        with pytest.raises(InvalidParameter, match="max_tokens"):
            client.generate("hi", SamplingParams(max_tokens=None))
        with pytest.raises(CallFailed, match="'gone' is not live"):
            client.abort("gone")

    with_client(visit)


def test_adapters_are_listed_loaded_pinned_and_unloaded(tmp_path: Path) -> None:
    source = adapter_folder(tmp_path, "new")

    def visit(client: Client) -> None:
        assert [each.name for each in client.adapters()] == ["poet", "team/coder"]
        assert client.adapter("poet").version is None
        assert client.load_adapter("new", source).version == "new"
        with pytest.raises(CallFailed, match="ALREADY_EXISTS"):
            client.load_adapter("new", source)
        client.load_adapter("new", source, replace=True)
        assert client.pin_adapter("new", 3).pinned == 3
        assert client.pin_adapter("new", 0).pinned == 0
        client.unload_adapter("new")
        assert [each.name for each in client.adapters()] == ["poet", "team/coder"]

    with_client(visit, ServeConfig(lora_roots=(tmp_path,)))


def test_the_key_and_the_authority_are_used(tmp_path: Path) -> None:
    authority, certificate, key = map(Path, make_certificates(tmp_path, ["127.0.0.1"]))

    def visit(client: Client) -> None:
        info = client.server_info()
        assert info.max_model_len == 512
        assert info.version

    access = AccessConfig(api_keys=("ask-key-1234",), tls_cert=certificate, tls_key=key)
    with_client(visit, ServeConfig(access=access), key="ask-key-1234", authority=authority)


def test_asyncios_client_streams_aborts_and_asks_as_the_other() -> None:
    async def scenario(door: Door) -> None:
        door.node.gate_after = 3
        door.node.gate.clear()
        async with AsyncClient(door.address, timeout_s=30) as client:
            stream = client.stream("hi", LONG, request_id="mine")
            parts = [await anext(stream), await anext(stream)]
            await client.abort("mine")
            parts += [part async for part in stream]
            assert ("".join(part.text for part in parts), parts[-1].ending) == ("ba", "aborted")
            door.node.gate.set()
            (whole,) = await client.generate("hi", LONG)
            assert whole.text == "base heard hi"
            assert [each.name async for each in client.adapters()] == ["poet", "team/coder"]
            with pytest.raises(CallFailed, match="NOT_FOUND"):
                await client.unload_adapter("nobody")

    at_door(scenario)


def test_a_stream_that_is_closed_frees_what_it_held() -> None:
    async def scenario(door: Door) -> None:
        door.node.gate_after = 3
        door.node.gate.clear()
        async with AsyncClient(door.address, timeout_s=30) as client:
            stream = client.stream("hi", LONG)
            await anext(stream)
            await stream.aclose()
            await door.node.abort_seen.wait()

    at_door(scenario)


def test_the_client_loads_neither_a_model_nor_torch() -> None:
    code = (
        "import sys, engine.client; sys.exit(any(each in sys.modules for each in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
