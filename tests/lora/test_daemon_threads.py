"""Threads that nobody has to wait for: bounds on queues and on waits, and an interpreter that ends."""

import subprocess
import sys
import threading

import pytest

from lora.daemon_threads import CallHangs, DaemonExecutor, DeadlineCalls, QueueFull

ENOUGH_S = 30


def test_a_pool_gives_results_and_errors() -> None:
    pool = DaemonExecutor(2, "test")
    assert [pool.submit(pow, 2, n).result(ENOUGH_S) for n in range(5)] == [1, 2, 4, 8, 16]
    assert isinstance(pool.submit(int, "x").exception(ENOUGH_S), ValueError)
    pool.shutdown()
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(pow, 2, 2)


def test_a_full_queue_refuses_and_takes_again_what_comes_later() -> None:
    gate, pool = threading.Event(), DaemonExecutor(1, "test", most_queued=2)
    jobs = [pool.submit(gate.wait, ENOUGH_S) for _ in range(3)]
    with pytest.raises(QueueFull, match="3 jobs"):
        pool.submit(gate.wait)
    gate.set()
    assert all(job.result(ENOUGH_S) for job in jobs)
    pool.shutdown()


def test_what_is_cancelled_before_its_turn_is_never_run() -> None:
    gate, ran, pool = threading.Event(), threading.Event(), DaemonExecutor(1, "test")
    first, second = pool.submit(gate.wait, ENOUGH_S), pool.submit(ran.set)
    assert second.cancel()
    gate.set()
    assert first.result(ENOUGH_S)
    pool.shutdown()
    assert not ran.is_set()


def test_a_call_that_hangs_ends_for_its_caller_and_is_not_made_again_until_it_has_returned() -> None:
    gate, calls = threading.Event(), DeadlineCalls(timeout_s=0.05)
    with pytest.raises(CallHangs, match=r"folder has not answered within 0\.05 s"):
        calls.run("folder", gate.wait)
    with pytest.raises(CallHangs, match="still does not answer"):
        calls.run("folder", lambda: None)
    assert calls.run("another", lambda: 7) == 7
    gate.set()
    for _ in range(ENOUGH_S * 100):
        try:
            assert calls.run("folder", lambda: 8) == 8
            break
        except CallHangs:
            threading.Event().wait(0.01)
    else:
        pytest.fail("the folder stayed refused")


def test_calls_that_hang_are_bounded() -> None:
    gate, calls = threading.Event(), DeadlineCalls(timeout_s=0.01, most=3)
    for number in range(3):
        with pytest.raises(CallHangs):
            calls.run(f"folder {number}", gate.wait)
    with pytest.raises(CallHangs, match="3 files are being read or hang"):
        calls.run("folder 3", lambda: None)
    gate.set()


def test_a_call_raises_its_own_errors() -> None:
    with pytest.raises(TimeoutError, match="the share is gone"):
        DeadlineCalls().run("folder", lambda: (_ for _ in ()).throw(TimeoutError("the share is gone")))


def test_the_interpreter_ends_though_threads_hang() -> None:
    program = """
import threading
from lora.daemon_threads import CallHangs, DaemonExecutor, DeadlineCalls
forever = threading.Event()
pool = DaemonExecutor(2, "hung")
pool.submit(forever.wait)
try:
    DeadlineCalls(0.01).run("folder", forever.wait)
except CallHangs:
    print("answered")
pool.shutdown(wait=False)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert run.stdout == "answered\n"
