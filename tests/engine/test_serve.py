"""Serving and stopping: the address that is told is the one that answers, and what runs may finish."""

import asyncio
import os
import signal
import socket
from collections.abc import Iterator
from typing import NoReturn

import aiohttp
import pytest

from engine.api.http import HttpServer
from engine.config.config import ServeConfig
from engine.errors import InvalidConfig
from engine.serve import FAILURE, main, serve, stopped_by_signals
from engine.tokenizer import Tokenizer
from scheduler.step import StepScheduler
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
