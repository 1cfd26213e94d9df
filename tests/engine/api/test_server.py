"""The server's parts by themselves: the lag of the event loop, lines that strangers cause, files that may be open."""

import asyncio
import logging
import re
import resource
from typing import Any

import pytest
from aiohttp import web

from engine.api.server.listener import HttpServer, most_connections
from engine.api.server.loop_lag import LoopLag
from engine.api.server.rate_limited_log import RateLimitedLog
from engine.config.http_config import HttpConfig
from engine.errors import InvalidConfig
from tests.engine.api.session import session

OVER = ("20ms", "100ms", "1000ms")


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


async def test_lag_is_what_a_tick_comes_too_late() -> None:
    clock, stalls = Clock(), list[float]()
    lag = LoopLag(stalls.append, clock, tick_s=0.5)
    lag.start()
    for late_s in (0.0, 0.25, 0.0, 2.0, 0.0):
        clock.now_s += 0.5 + late_s
        lag.tick()
    lag.stop()
    assert stalls == [0.25, 2.0]


async def test_lag_is_measured_until_it_is_stopped() -> None:
    seen, clock = asyncio.Event(), Clock()

    def stalled(seconds: float) -> None:
        assert seconds == 1.0
        seen.set()

    lag = LoopLag(stalled, clock, tick_s=0.001)
    lag.start()
    clock.now_s += 1.001
    await seen.wait()
    lag.stop()


def test_lines_are_bounded_in_number_and_length_and_what_is_left_out_is_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    limited = RateLimitedLog(logging.getLogger("test"), logging.WARNING, lines=2, period_s=60, clock=clock)
    for number in range(5):
        limited.line(f"line {number}")
    clock.now_s += 60
    limited.line("\x1b[31m\n" + "é" * 1000)
    assert caplog.messages[:2] == ["line 0", "line 1"]
    assert caplog.messages[2].startswith("\\x1b[31m\\n\\xe9")
    assert caplog.messages[2].endswith("... (3 more of these before)")
    assert len(caplog.messages) == 3


@pytest.mark.parametrize(
    ("limits", "asked", "allowed", "raised"),
    [
        ((4096, 4096), None, 1024, None),
        ((4096, 4096), 100, 100, None),
        ((256, 4096), None, 1024, 1152),
        ((256, 512), None, 384, 512),
        ((256, 512), 384, 384, 512),
        ((64, 64), None, 16, 64),
        ((256, resource.RLIM_INFINITY), 5000, 5000, 5128),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), 5000, 5000, None),
    ],
)
def test_as_many_connections_are_open_as_the_process_may_have(
    limits: tuple[int, int],
    asked: int | None,
    allowed: int,
    raised: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda kind, to: given.append(to))
    assert most_connections(asked) == allowed
    assert given == ([] if raised is None else [(raised, limits[1])])


def test_more_connections_than_the_process_may_have_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, 512))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, to: None)
    with pytest.raises(InvalidConfig, match=r"max_connections=385 is not accepted: .* give at most 384"):
        most_connections(385)


async def test_a_process_without_free_files_does_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    server = HttpServer(web.Application())
    await server.listen("127.0.0.1", 0)
    loop = asyncio.get_running_loop()
    fault = OSError(24, "Too many open files")
    for _ in range(1000):
        loop.call_exception_handler({"message": "socket.accept() out of system resource", "exception": fault})
    loop.call_exception_handler({"message": "something else", "exception": KeyError("x")})
    await server.close()
    lines = [record.message for record in caplog.records]
    assert 1 <= sum("no connection can be accepted" in line for line in lines) <= 10
    assert sum("something else" in line for line in lines) == 1


async def test_what_holds_up_the_event_loop_is_counted_among_the_metrics() -> None:
    async with session() as api:
        for seconds in (0.01, 0.05, 0.5, 100.0):
            api.engine.telemetry.loop_was_late(seconds)
        told = (await api.send("GET", "/metrics")).body.decode()
    counts = {over: re.search(rf'event_loop_stalls_total{{over="{over}"}} ([0-9.]+)', told) for over in OVER}
    assert [float(found[1]) for found in counts.values() if found] >= [3.0, 2.0, 1.0]
    assert "loraserve_event_loop_longest_stall_seconds 100.0" in told


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"idle_timeout_s": 0.0}, "idle_timeout_s"),
        ({"header_timeout_s": 0}, "header_timeout_s"),
        ({"max_body_bytes": 2000, "max_bodies_bytes": 1999}, "max_bodies_bytes"),
        ({"max_connections": 0}, "max_connections"),
    ],
)
def test_bounds_that_let_nothing_through_are_refused(values: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidConfig) as refusal:
        HttpConfig(**values)
    assert refusal.value.field == field
