"""A service on Ray answers, grows and shrinks without a lost request, outlives a machine, and leaves nothing behind.

Each test goes on from what the one before it left: a start takes seconds.
"""

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.e2e.steady_clients import SteadyClients
from tests.ray.local_ray import KEY, TOKEN, LocalRay

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalRay]:
    """Three raylets that have room for two nodes each."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(Path(__file__).parents[2])}
    made = LocalRay(tmp_path_factory.mktemp("ray"), 3, 2)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def service(ray: LocalRay) -> Iterator[subprocess.Popen[str]]:
    """A service of two nodes, and the launcher that started it."""
    launcher = ray.start("--nodes", "2")
    try:
        assert launcher.stdout is not None
        line = launcher.stdout.readline()
        assert re.match(rf"ready at http://127.0.0.1:{ray.port}: 2 nodes on Ray; Ctrl-C leaves", line), line
        yield launcher
    finally:
        launcher.kill()
        launcher.wait()


def test_where_there_is_no_service_every_command_says_so(ray: LocalRay) -> None:
    assert (ray.run("--status").returncode, ray.run("--stop").returncode) == (1, 0)
    refused = ray.run("--scale", "2")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "scale=2 is not accepted: no service runs" in refused.stderr


def test_where_room_is_lacking_one_line_says_so_and_nothing_is_left(ray: LocalRay) -> None:
    refused = ray.run("--nodes", "7", "--ray-wait-s", "2", *ray.trust, *ray.small)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert (
        "nodes=7 is not accepted: Ray had no room for 7 more within 2 s: each takes 1 CPU" in refused.stderr
    )
    apart = ray.run("--nodes", "4", "--ray-spread", "--ray-wait-s", "2", *ray.trust, *ray.small)
    assert apart.returncode == 2
    assert "on a machine of its own" in apart.stderr
    assert ray.run("--status").returncode == 1


def test_a_member_that_can_never_start_ends_the_start_with_its_line(ray: LocalRay) -> None:
    refused = ray.run("--nodes", "1", *ray.trust, *ray.small, "--adapter-bytes", "100TiB")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "node-0 cannot start: python -m engine.serve: adapter_bytes=" in refused.stderr
    assert ray.run("--status").returncode == 1


def test_a_service_answers_and_outlives_its_launcher(ray: LocalRay, service: subprocess.Popen[str]) -> None:
    assert ray.chat("reverse", "garden") == "nedrag"
    service.send_signal(signal.SIGINT)
    assert service.wait(30) == 0
    assert service.stdout is not None
    assert "the service goes on" in service.stdout.read()
    members = ray.members()
    assert {name: row[2] for name, row in members.items()} == dict.fromkeys(
        ("coordinator", "node-0", "node-1", "router-0"), "ready"
    )
    assert ray.chat("reverse", "garden") == "nedrag"
    assert "a service runs on this Ray cluster" in ray.run("--nodes", "1", *ray.trust, *ray.small).stderr


def test_no_secret_is_in_a_command_line_or_in_what_ray_writes(
    ray: LocalRay, service: subprocess.Popen[str]
) -> None:
    lines = [word for process in ray.processes() for word in process.cmdline()]
    assert lines
    assert not [word for word in lines if TOKEN in word or KEY in word]
    written = ray.written()
    assert b"ready at" in written, "members' lines are in Ray's logs"
    assert TOKEN.encode() not in written
    assert KEY.encode() not in written


def test_a_node_whose_machine_is_lost_comes_back_on_another_and_takes_its_share(
    ray: LocalRay, service: subprocess.Popen[str]
) -> None:
    expected = ray.complete("reverse", 40)
    load = SteadyClients(lambda: ray.complete("reverse", 40), 2)
    try:
        before = ray.kill_raylet_of("node-1")
        members = ray.until("node-0", "node-1")
        asked = load.texts.total()
        deadline_s = time.monotonic() + 60
        while load.texts.total() < asked + 5:
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
    finally:
        load.end()
    assert (load.errors, load.refused) == ([], 0)
    assert set(load.texts) == {expected}
    assert ray.process("node-1").pid != before
    assert not psutil.pid_exists(before), "the process outlives its machine"
    assert len({members[name][1] for name in ("node-0", "node-1")}) == 2
    _takes_a_share(ray, "node-1")


def _takes_a_share(ray: LocalRay, name: str) -> None:
    """Ask for several adapters at once until the router has sent the node some requests."""
    served = f'loraserve_requests_forwarded_total{{node="{name}"}}'
    deadline_s = time.monotonic() + 60
    while True:
        threads = [
            threading.Thread(target=ray.complete, args=(model, 30))
            for model in ("reverse", "upper", "sort", "demo")
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if any(line.startswith(served) and not line.endswith(" 0.0") for line in ray.metrics()):
            return
        assert time.monotonic() < deadline_s, f"{name} was asked for nothing"


def test_growing_and_shrinking_under_load_loses_no_request(
    ray: LocalRay, service: subprocess.Popen[str]
) -> None:
    expected = ray.complete("reverse", 40)
    load = SteadyClients(lambda: ray.complete("reverse", 40), 2)
    try:
        grown = ray.run("--scale", "4")
        assert grown.stdout == "4 nodes: 2 started, 0 drained and ended\n", grown
        ray.until("node-0", "node-1", "node-2", "node-3")
        shrunk = ray.run("--scale", "2")
        assert shrunk.stdout == "2 nodes: 0 started, 2 drained and ended\n", shrunk
        ray.until("node-0", "node-1")
    finally:
        load.end()
    assert (load.errors, load.refused) == ([], 0)
    assert load.texts.total() > 10
    assert set(load.texts) == {expected}


def test_stop_leaves_no_actor_no_room_and_no_process(ray: LocalRay, service: subprocess.Popen[str]) -> None:
    stopped = ray.run("--stop")
    assert stopped.stdout == "stopped: 4 members have ended\n", stopped
    assert ray.run("--status").returncode == 1
    assert ray.processes() == []
    spread = ray.start("--nodes", "2", "--ray-spread")
    assert spread.stdout is not None
    try:
        assert spread.stdout.readline().startswith("ready at"), "the room was given back"
        refused = ray.run("--scale", str(len(ray.raylets) + 1), "--ray-wait-s", "2")
        assert re.search(r"scale=\d is not accepted: .* on a machine of its own", refused.stderr), refused
        assert len(ray.members()) == 4
    finally:
        spread.send_signal(signal.SIGINT)
        spread.communicate(timeout=30)
        ray.run("--stop")
    assert ray.processes() == []


def test_a_service_between_bounds_follows_its_load_whoever_started_it(ray: LocalRay) -> None:
    patience = ("--grow-after-s", "3", "--shrink-after-s", "4")
    launcher = ray.start("--nodes", "1:2", *patience, "--max-num-seqs", "2", "--slo-ttft-s", "3")
    assert launcher.stdout is not None
    try:
        assert re.match(r"ready at .*: 1 nodes on Ray", launcher.stdout.readline())
        ray.until_served("reverse")
        expected = ray.complete("reverse", 40)
        launcher.send_signal(signal.SIGINT)
        launcher.communicate(timeout=60)
        assert ray.members()["scaler"][1:] == ["1:2", "ready"]
        many = SteadyClients(lambda: ray.complete("reverse", 40), 24)  # more than one node has seats for
        try:
            ray.until("node-0", "node-1")
        finally:
            many.end()
        assert many.errors == [], "a request is answered or told to come again"
        assert set(many.texts) == {expected}
        ray.until("node-0")
        assert ray.complete("reverse", 40) == expected
        assert "follows the load, within 2:3" in ray.run("--scale", "2:3", *patience).stdout
        ray.until("node-0", "node-1")
        assert ray.members()["scaler"][1:] == ["2:3", "ready"]
        assert ray.run("--scale", "1").stdout == "1 nodes: 0 started, 1 drained and ended\n"
        assert "scaler" not in ray.members(), "the number is fixed"
    finally:
        launcher.kill()
        launcher.wait()
        ray.run("--stop")
    assert ray.processes() == []
