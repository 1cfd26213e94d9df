"""Serving and stopping: the address that is told is the one that answers, and what runs may finish."""

import asyncio
import gc
import os
import signal
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import aiohttp
import pytest

from engine.api.errors import ApiError
from engine.api.keys import Permission
from engine.api.server.configured import access_rules
from engine.api.server.listener import HttpServer
from engine.assembly.assembly import Engine
from engine.async_engine import AsyncEngine
from engine.config.access_config import AccessConfig
from engine.config.config import ServeConfig
from engine.errors import InvalidConfig
from engine.serve import FAILURE, main, serve
from engine.server_process import freeze_objects, stopped_by_signals
from engine.tenants.tenant import Tenant
from engine.tokenizer import Tokenizer
from scheduler.step import StepScheduler
from scheduler.tenant_turns import TenantTurns
from scripts.certificates import make_certificates
from tests.fakes.engine_client import FakeClient
from tests.fakes.tokenizers import byte_tokenizer

CODEC = Tokenizer(byte_tokenizer())


@pytest.fixture
def dispositions() -> Iterator[None]:
    """The signals' handlers as they were."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_told_to_stop_it_takes_nothing_new_and_finishes_what_runs() -> None:
    async def scenario() -> None:
        node, stop = FakeClient(CODEC), asyncio.Event()
        told: asyncio.Queue[str] = asyncio.Queue()
        config = ServeConfig(port=0, drain_s=5)
        server = asyncio.create_task(serve(node, config, told.put_nowait, stop))
        address = await told.get()
        node.gate.clear()
        node.drained_by = node.gate.set
        async with aiohttp.ClientSession(address) as client:
            body = {"model": "base", "prompt": "hi"}
            running = asyncio.create_task(client.post("/v1/completions", json=body))
            await node.gate_reached.wait()
            stop.set()
            answer = await running
            assert (await answer.json())["choices"][0]["text"] == "base heard hi"
            await server
            with pytest.raises(aiohttp.ClientConnectionError):
                await client.get("/health")
        assert node.calls == ["start", "drain 5", "close"]

    asyncio.run(scenario())


def test_a_server_whose_engine_fails_answers_503_and_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fault(*arguments: object) -> NoReturn:
        raise KeyError("the books do not balance")

    async def ask(address: str) -> int:
        monkeypatch.setattr(StepScheduler, "plan", fault)
        async with aiohttp.ClientSession(address) as client:
            body = {"model": "demo", "prompt": "hi"}
            asked = await client.post("/v1/completions", json=body)
            return asked.status

    answers: list[asyncio.Task[int]] = []
    listen = HttpServer.listen

    async def listen_and_ask(server: HttpServer, host: str, port: int) -> str:
        address = await listen(server, host, port)
        answers.append(asyncio.create_task(ask(address)))
        return address

    monkeypatch.setattr(HttpServer, "listen", listen_and_ask)
    assert main(["--port", "0", "--no-progress"]) == FAILURE
    assert answers[0].result() == 503
    assert "the engine has stopped (KeyError" in capsys.readouterr().err


def test_a_port_that_is_taken_is_named() -> None:
    async def scenario(port: int) -> None:
        node = FakeClient(CODEC)
        with pytest.raises(InvalidConfig, match=f"port={port}"):
            await serve(node, ServeConfig(port=port), lambda address: None, asyncio.Event())
        assert node.calls == ["start", "close"]

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        asyncio.run(scenario(taken.getsockname()[1]))


def test_a_single_server_gives_tenants_turns_and_a_node_leaves_that_to_routers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    turns: list[TenantTurns] = []

    async def run(node: AsyncEngine, engine: Engine, config: ServeConfig) -> None:
        turns.append(engine.turns)
        node.accounts.adopt([Tenant("a", weight=4.0)])
        engine.turns.charge("a", 8)
        await node.close()

    monkeypatch.setattr("engine.serve._run", run)
    monkeypatch.setenv("LORASERVE_PEER_TOKEN", "a-token-of-sixteen")
    plain = ("--no-progress", "--no-self-test")
    member = ("--role", "node", "--coordinator", "127.0.0.1:9", "--peer-plain")
    for arguments in (plain, (*plain, *member, "--cluster-listen", "127.0.0.1:0")):
        assert main(arguments) == 0
    assert [each.is_on for each in turns] == [True, False]
    assert turns[0].given("a") == 2


def test_a_server_is_told_ready_once_it_can_serve_and_not_before(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        node, stop, told = FakeClient(CODEC), asyncio.Event(), asyncio.Event()
        node.trouble = "this cluster has no node"
        server = asyncio.create_task(serve(node, ServeConfig(port=0), lambda address: told.set(), stop))
        while "not ready yet: this cluster has no node" not in caplog.text:
            await asyncio.sleep(0.01)
        assert not told.is_set()
        node.trouble = None
        await asyncio.wait_for(told.wait(), 30)
        stop.set()
        await server

    asyncio.run(scenario())


def test_a_server_that_ends_before_it_could_serve_is_not_told_ready() -> None:
    async def scenario() -> None:
        node, stop, told = FakeClient(CODEC), asyncio.Event(), asyncio.Event()
        node.trouble = "this cluster has no node"
        stop.set()
        await serve(node, ServeConfig(port=0), lambda address: told.set(), stop)
        assert not told.is_set()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(scenario())


def test_a_server_whose_readiness_cannot_be_told_ends_with_the_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fault(address: str) -> NoReturn:
        raise BrokenPipeError(address)

    async def scenario() -> None:
        node = FakeClient(CODEC)
        node.trouble = "this cluster has no node"
        server = asyncio.create_task(serve(node, ServeConfig(port=0), fault, asyncio.Event()))
        while "not ready yet" not in caplog.text:
            await asyncio.sleep(0.01)
        node.trouble = None
        with pytest.raises(BrokenPipeError):
            await asyncio.wait_for(server, 30)
        assert node.calls == ["start", "close"]

    asyncio.run(scenario())


@pytest.mark.usefixtures("dispositions")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_stops_and_the_second_finds_the_system_s_default(number: int) -> None:
    async def scenario() -> None:
        stop = stopped_by_signals()
        assert not stop.is_set()
        os.kill(os.getpid(), number)
        await stop.wait()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL

    asyncio.run(scenario())


def test_garbage_collection_skips_what_lives_when_a_server_is_ready() -> None:
    made: list[list[int]] = [[] for _ in range(1000)]
    try:
        freeze_objects()
        seen = {id(each) for each in gc.get_objects()}
        assert not seen & {id(each) for each in made}
    finally:
        gc.unfreeze()


@pytest.mark.parametrize(
    ("host", "keys", "warned"),
    [("127.0.0.1", (), False), ("localhost", (), False), ("0.0.0.0", (), True), ("0.0.0.0", ("key",), False)],
)
def test_a_server_that_everybody_may_use_says_so_once(
    host: str, keys: tuple[str, ...], warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    access_rules(ServeConfig(host=host, access=AccessConfig(api_keys=keys)))
    told = [record.getMessage() for record in caplog.records]
    assert [("without an API key" in line and "LORASERVE_API_KEY" in line) for line in told] == [
        True
    ] * warned


@pytest.mark.parametrize(
    ("host", "allowed", "is_local", "opens"),
    [
        ("127.0.0.1", False, True, True),
        ("127.0.0.1", False, False, False),
        ("::1", False, True, True),
        ("0.0.0.0", False, True, False),
        ("0.0.0.0", True, False, True),
    ],
)
def test_without_an_admin_key_only_a_server_of_this_machine_is_administered(
    host: str, allowed: bool, is_local: bool, opens: bool
) -> None:
    rules = access_rules(ServeConfig(host=host, access=AccessConfig(allow_admin_without_key=allowed)))
    if opens:
        rules.admit(Permission.ADMINISTER, None, is_local)
    else:
        with pytest.raises(ApiError, match="administration is off"):
            rules.admit(Permission.ADMINISTER, None, is_local)


def test_https_is_served_with_the_certificate_and_its_key(tmp_path: Path) -> None:
    authority, certificate, key = make_certificates(tmp_path, ["127.0.0.1"])
    access = AccessConfig(tls_cert=Path(certificate), tls_key=Path(key))
    trusting = ssl.create_default_context(cafile=authority)

    async def scenario() -> None:
        node, stop = FakeClient(CODEC), asyncio.Event()
        told: asyncio.Queue[str] = asyncio.Queue()
        config = ServeConfig(port=0, access=access)
        server = asyncio.create_task(serve(node, config, told.put_nowait, stop))
        address = await told.get()
        assert address.startswith("https://127.0.0.1:")
        async with (
            aiohttp.ClientSession() as client,
            client.get(f"{address}/health", ssl=trusting) as answer,
        ):
            assert answer.status == 200
        stop.set()
        await server

    asyncio.run(scenario())


@pytest.mark.parametrize("fault", ["empty", "no PEM", "another's key", "a key that asks for a password"])
def test_a_certificate_that_cannot_be_used_is_refused_at_start(fault: str, tmp_path: Path) -> None:
    _, certificate, key = map(Path, make_certificates(tmp_path / "one", ["127.0.0.1"]))
    if fault == "another's key":
        key = Path(make_certificates(tmp_path / "two", ["127.0.0.1"])[2])
    elif fault == "a key that asks for a password":
        encrypt = ["openssl", "ec", "-aes256", "-passout", "pass:x", "-in", str(key), "-out", str(key)]
        subprocess.run(encrypt, check=True, capture_output=True)
    else:
        certificate.write_text("" if fault == "empty" else fault)
    config = ServeConfig(port=0, access=AccessConfig(tls_cert=certificate, tls_key=key))
    with pytest.raises(InvalidConfig, match=r"tls_cert=.*give a PEM certificate and its key"):
        asyncio.run(serve(FakeClient(CODEC), config, lambda address: None, asyncio.Event()))


@pytest.mark.parametrize("option", ["audit_log", "access_log_file"])
def test_a_log_that_cannot_be_opened_is_refused_at_start(option: str, tmp_path: Path) -> None:
    config = ServeConfig(port=0, access_log="json", **{option: tmp_path / "no" / "log"})
    with pytest.raises(InvalidConfig, match=f"^{option}=.*folder that is there"):
        asyncio.run(serve(FakeClient(CODEC), config, lambda address: None, asyncio.Event()))
