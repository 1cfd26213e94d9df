"""The trial by harm: its adapters do what they should, its clients miss nothing, and its rows tell all."""

import asyncio
import gzip
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import pytest
import torch
from aiohttp import web
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]

from engine.demo.embedded import TASKS, adapter_folders
from lora.format.adapter_files import WEIGHTS_FILE
from lora.format.peft_config import read_settings
from scripts.chaos.adapter_copies import RANKS, AdapterCopy, plan_copies, write_copies
from scripts.chaos.load import ClientLoad
from scripts.chaos.move_counts import MoveCounts
from scripts.chaos.network import Network, NetworkRefused
from scripts.chaos.questions import Asked
from scripts.chaos.records import FaultRecord, Records, RequestRecord

UPPER = next(task for task in TASKS if task.name == "upper")
ASKED = Asked(0.0, AdapterCopy("upper-r8-0", UPPER, 8), "garden", 16)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def test_a_copy_has_its_rank_and_the_function_of_the_original_to_the_last_bit(tmp_path: Path) -> None:
    copies = plan_copies(15, seed=3)
    write_copies(copies, tmp_path, seed=3)
    assert {copy.rank for copy in copies} == set(RANKS)
    assert {copy.task.name for copy in copies} == {task.name for task in TASKS}
    contents = {(tmp_path / copy.name / WEIGHTS_FILE).read_bytes() for copy in copies}
    assert len(contents) == len(copies)
    for copy in copies:
        original = adapter_folders()[copy.task.name]
        before, after = load_file(original / WEIGHTS_FILE), load_file(tmp_path / copy.name / WEIGHTS_FILE)
        settings, changed = read_settings(original), read_settings(tmp_path / copy.name)
        assert before.keys() == after.keys()
        for key in (key for key in before if ".lora_A." in key):
            other, module = key.replace("lora_A", "lora_B"), key.split("model.", 1)[1].split(".lora_A")[0]
            # Sums of products of bfloat16 are exact in float64, in whatever order.
            update = settings.scale(module) * (before[other].double() @ before[key].double())
            same = changed.scale(module) * (after[other].double() @ after[key].double())
            assert after[key].shape[0] == copy.rank == changed.rank(module)
            assert torch.allclose(update, same, rtol=1e-12, atol=0)


class Whole:
    """Answers that are right in capitals."""

    def is_right(self, asked: Asked, answer: str, tokens: int) -> bool:
        """Compare with the task's program."""
        return answer == asked.adapter.task.answer(asked.text)


def _events(*events: dict[str, Any], done: bool = True) -> Handler:
    """Return what streams these events."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for event in events:
            await response.write(f"data: {json.dumps(event)}\n\n".encode())
        if done:
            await response.write(b"data: [DONE]\n\n")
        return response

    return answer


def _says(text: str) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text}}]}


def _status(number: int) -> Handler:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.json_response({"error": {"message": "no"}}, status=number)

    return answer


def _load(handlers: Iterator[Handler], troubled: bool = False) -> ClientLoad:
    """Ask one question of a router that answers each attempt by the next of `handlers`."""

    async def session() -> ClientLoad:
        app = web.Application()

        async def chat(request: web.Request) -> web.StreamResponse:
            return await next(handlers)(request)

        app.add_routes([web.post("/v1/chat/completions", chat)])
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            async with aiohttp.ClientSession() as client:
                routers = {"router-0": f"http://127.0.0.1:{runner.addresses[0][1]}"}
                load = ClientLoad(client, routers, Whole(), lambda router: troubled, Random(0))
                await load.play([ASKED], asyncio.get_running_loop().time())
                return load
        finally:
            await runner.cleanup()

    return asyncio.run(session())


RIGHT = _events(_says("GAR"), _says("DEN"))


def test_a_client_goes_on_to_another_router_until_it_has_an_answer() -> None:
    load = _load(iter([_status(503), _events(_says("GA"), done=False), RIGHT]), troubled=True)
    (record,) = load.records.requests
    assert (record.outcome, record.attempts) == ("right", 3)
    assert (load.records.streams_broken, load.records.streams_failed) == (0, 0)
    assert load.records.is_sound


@pytest.mark.parametrize(
    ("handler", "outcome"),
    [(_status(429), "refused"), (_status(500), "lost"), (_events(_says("GARDENS")), "wrong"),
     (_events({"choices": 5}), "lost")],
)  # fmt: skip
def test_what_is_no_right_answer_is_told_as_what_it_is(handler: Handler, outcome: str) -> None:
    load = _load(iter([handler]))
    assert [each.outcome for each in load.records.requests] == [outcome]
    assert load.records.is_sound == (outcome == "refused")


@pytest.mark.parametrize(
    ("handler", "failed", "broken"),
    [(_events({"error": {"message": "no"}}), 1, 0), (_events(_says("GA"), done=False), 0, 1)],
)
def test_a_stream_that_ends_though_nothing_befell_its_router_is_told(
    handler: Handler, failed: int, broken: int
) -> None:
    load = _load(iter([handler, RIGHT]))
    assert [each.outcome for each in load.records.requests] == ["right"]
    assert (load.records.streams_failed, load.records.streams_broken) == (failed, broken)
    assert not load.records.is_sound


def test_moves_are_summed_over_a_routers_new_beginnings() -> None:
    async def session() -> int:
        counts = iter([3, 5, 1, 2])

        async def metrics(request: web.Request) -> web.Response:
            return web.Response(text=f"# TYPE x\nloraserve_requests_moved_total {next(counts)}.0\n")

        app = web.Application()
        app.add_routes([web.get("/metrics", metrics)])
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            async with aiohttp.ClientSession() as client:
                moves = MoveCounts(client, {"router-0": f"http://127.0.0.1:{runner.addresses[0][1]}"})
                for _ in range(4):
                    await moves.look()
                return moves.total
        finally:
            await runner.cleanup()

    assert asyncio.run(session()) == 5 + 2


def test_rows_tell_the_run_then_faults_then_requests_in_order(tmp_path: Path) -> None:
    records = Records(
        [RequestRecord(2.0, 3.0, "a", 20, 1, 0.25, "right"), RequestRecord(1.0, 1.5, "b", 20, 2, None, "lost", "no")],
        [FaultRecord("parted", "node-1+router-0", 0.5, 4.0), FaultRecord("killed", "node-2", 1.0, 1.0)],
        moved=4,
    )  # fmt: skip
    for name in ("one", "two"):
        records.write(tmp_path / name, {"seed": 1})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    first, *rows = [
        json.loads(line) for line in gzip.decompress((tmp_path / "one").read_bytes()).splitlines()
    ]
    assert (first["asked"], first["requests"], first["lost"], first["moved"]) == ({"seed": 1}, 2, 1, 4)
    assert first["by_fault"] == {"node and router parted": 1, "node killed": 1}
    assert [row.get("fault") or row["adapter"] for row in rows] == ["parted", "killed", "b", "a"]


ECHO = """
import socket, sys
server = socket.create_server(("0.0.0.0", 5000))
print("listens", flush=True)
while True:
    server.accept()[0].sendall(b"here")
"""
ASK = """
import socket, sys
with socket.create_connection((sys.argv[1], 5000), float(sys.argv[2])) as asked:
    print(asked.recv(4).decode())
"""


def test_members_that_are_parted_or_cut_off_do_not_reach_each_other_until_they_are_joined() -> None:
    network = Network(("one", "two"))
    try:
        network.open()
    except NetworkRefused as error:
        pytest.skip(f"no network namespaces here: {error}")
    server = subprocess.Popen(
        [*network.inside("two"), sys.executable, "-c", ECHO], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None

    def reaches(within_s: float) -> bool:
        ask = [*network.inside("one"), sys.executable, "-c", ASK, network.hosts["two"], str(within_s)]
        return subprocess.run(ask, capture_output=True, text=True, check=False).stdout == "here\n"

    try:
        server.stdout.readline()
        assert reaches(10.0)
        network.part("one", "two")
        assert not reaches(0.3)
        network.join("one", "two")
        network.slow("two")
        assert reaches(10.0)
        network.hasten("two")
        network.cut("two")
        assert not reaches(0.3)
        network.mend("two")
        assert reaches(10.0)
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
        network.close()
