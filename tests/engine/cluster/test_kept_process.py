"""A member's process is started again when it ends, ends when told to, and never outlives who keeps it."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from engine.cluster.launching import kept_process
from engine.cluster.launching.kept_process import KeptProcess

BOUND_S = 60.0
SAYS_AND_ENDS = "import os; print('pid', os.getpid(), flush=True); raise SystemExit(3)"
WAITS = "import os, time; print('pid', os.getpid(), flush=True); time.sleep(600)"
DRAINS = """
import signal, time
def drain(*_):
    print("drained", flush=True)
    raise SystemExit(0)
signal.signal(signal.SIGTERM, drain)
print("up", flush=True)
time.sleep(600)
"""
KEEPER = """
import asyncio, sys
from engine.cluster.launching.kept_process import KeptProcess
asyncio.run(KeptProcess("waits", (sys.executable, "-c", sys.argv[1])).run())
"""


def program(text: str) -> tuple[str, ...]:
    return (sys.executable, "-c", text)


async def until(lines: list[str], count: int) -> None:
    async with asyncio.timeout(BOUND_S):
        while len(lines) < count:
            await asyncio.sleep(0.01)


def test_a_process_that_ends_is_started_again_and_tells_its_lines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kept_process, "_MOST_PAUSE_S", 0.01)

    async def scenario() -> None:
        lines: list[str] = []
        kept = KeptProcess("ends", program(SAYS_AND_ENDS), told=lines.append)
        running = asyncio.create_task(kept.run())
        await until(lines, 3)
        await kept.end(0.0)
        await running
        assert len(set(lines)) == len(lines), "each start is a process of its own"

    asyncio.run(scenario())


def test_what_a_process_does_is_finished_before_it_ends_and_it_is_not_started_again() -> None:
    async def scenario() -> None:
        lines: list[str] = []
        kept = KeptProcess("drains", program(DRAINS), told=lines.append)
        running = asyncio.create_task(kept.run())
        await until(lines, 1)
        await kept.end(BOUND_S)
        await running
        assert (lines, kept.last_code, kept.pid) == (["up", "drained"], 0, None)

    asyncio.run(scenario())


def test_a_process_that_does_not_end_in_time_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_process, "_GRACE_S", 0.0)

    async def scenario() -> None:
        lines: list[str] = []
        stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + WAITS
        kept = KeptProcess("stubborn", program(stubborn), told=lines.append)
        running = asyncio.create_task(kept.run())
        await until(lines, 1)
        await kept.end(0.05)
        await running
        assert kept.last_code == -signal.SIGKILL

    asyncio.run(scenario())


def test_a_line_longer_than_may_be_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_process, "_MOST_LINE_BYTES", 100)

    async def scenario() -> None:
        lines: list[str] = []
        kept = KeptProcess(
            "long", program("print('x' * 1000 + '\\n' + 'short'); " + WAITS), told=lines.append
        )
        running = asyncio.create_task(kept.run())
        async with asyncio.timeout(BOUND_S):
            while "short" not in lines:
                await asyncio.sleep(0.01)
        kept.kill()
        await running

    asyncio.run(scenario())


def test_a_process_goes_behind_others_by_its_niceness() -> None:
    async def scenario() -> None:
        lines: list[str] = []
        tells = program("import os; print(os.nice(0), flush=True); " + WAITS)
        kept = KeptProcess("nice", tells, told=lines.append, niceness=3)
        running = asyncio.create_task(kept.run())
        await until(lines, 1)
        kept.kill()
        await running
        assert lines[0] == str(min(19, os.nice(0) + 3))

    asyncio.run(scenario())


def test_a_process_ends_with_a_keeper_that_is_killed() -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    keeper = subprocess.Popen(
        [sys.executable, "-c", KEEPER, WAITS], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert keeper.stdout is not None
    child = psutil.Process(int(keeper.stdout.readline().split()[1]))
    keeper.kill()
    keeper.wait()
    keeper.stdout.close()
    deadline_s = time.monotonic() + BOUND_S
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline_s, "the process outlives its keeper"
        time.sleep(0.01)
