"""What Ray is asked to run, and what changes with the number of nodes: no Ray is needed to decide it."""

import pickle
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from engine.cluster.launching.member_lines import MemberLines
from engine.cluster.launching.ray_cluster import RayCluster
from engine.cluster.launching.ray_launcher import table
from engine.cluster.launching.ray_plan import Change, Group, Service, change_to, group_of, refuse_secrets
from engine.cluster.launching.role_actor import ActorStatus
from engine.config.command_line import serve_config
from engine.config.config import ServeConfig
from engine.errors import InvalidConfig
from transport.base import Address

RAY = ("--launcher", "ray")


@pytest.fixture
def trust(tmp_path: Path) -> list[str]:
    token = tmp_path / "token"
    token.write_text("a-token-of-sixteen")
    return ["--peer-token-file", str(token), "--peer-plain"]


def groups(*pairs: tuple[int, int]) -> tuple[Group, ...]:
    return tuple(Group(*pair) for pair in pairs)


def service(arguments: Sequence[str], config: ServeConfig, gpus: int = 0) -> Service:
    return Service(
        MemberLines.of(arguments, config, "127.0.0.1:7000"), "/work", config.drain_s, 2, gpus, False
    )


@pytest.mark.parametrize(
    ("wanted", "running", "have", "spread", "expected"),
    [
        (2, (), (), False, Change(groups((0, 1), (1, 1)), (0, 1))),
        (2, (), (), True, Change(groups((0, 2)), (0, 1))),
        (4, (0, 1), groups((0, 1), (1, 1)), False, Change(groups((2, 1), (3, 1)), (2, 3))),
        (4, (0, 1), groups((0, 2)), True, Change(groups((2, 2)), (2, 3))),
        (
            2,
            (0, 1, 2, 3),
            groups((0, 1), (1, 1), (2, 1), (3, 1)),
            False,
            Change((), (), (3, 2), groups((2, 1), (3, 1))),
        ),
        (2, (0, 1, 2, 3), groups((0, 2), (2, 2)), True, Change((), (), (3, 2), groups((2, 2)))),
        (3, (0, 1, 2, 3), groups((0, 4)), True, Change((), (), (3,))),
        (4, (0, 1, 2), groups((0, 4)), True, Change((), (3,))),
        (3, (0, 2), groups((0, 1), (1, 1), (2, 1)), False, Change((), (1,))),
        (2, (0, 1), groups((0, 1), (1, 1)), False, Change()),
    ],
)
def test_a_change_of_the_number_of_nodes_says_what_is_started_and_what_is_given_back(
    wanted: int, running: Sequence[int], have: Sequence[Group], spread: bool, expected: Change
) -> None:
    assert change_to(wanted, running, have, spread) == expected


def test_whatever_the_steps_every_node_has_room_and_no_room_is_kept_for_nothing() -> None:
    for spread in (False, True):
        running: set[int] = set()
        have: set[Group] = set()
        for wanted in (3, 5, 2, 4, 1, 6, 6, 1):
            change = change_to(wanted, sorted(running), sorted(have), spread)
            have = (have | set(change.reserve)) - set(change.release)
            running = (running | set(change.start)) - set(change.drain)
            assert running == set(range(wanted))
            assert all(group_of(at, sorted(have)) for at in running)
            seats = [at for group in have for at in group.nodes]
            assert len(seats) == len(set(seats))
            assert all(running & set(group.nodes) for group in have)


def test_a_group_is_known_by_its_name_and_nothing_else_of_ray_is_taken_for_one() -> None:
    assert Group.named(Group(2, 3).name) == Group(2, 3)
    assert [Group.named(name) for name in ("", "other", "loraserve-nodes-1", "loraserve-nodes-a-1")] == [
        None
    ] * 4


def test_members_are_told_what_a_local_launcher_tells_them_and_nothing_of_the_launch(
    trust: list[str],
) -> None:
    arguments = [
        *(*RAY, "--nodes", "2", "--ray-spread", "--ray-cpus=2", "--ray-wait-s", "1", "--host", "0.0.0.0"),
        *("--routers", "2", "--port", "9000", "--max-num-seqs", "4", "--registry-file", "names", *trust),
    ]
    made = service(arguments, serve_config(arguments, {}))
    for kind, at, name in (
        ("coordinator", 0, "coordinator"),
        ("node", 1, "node-1"),
        ("router", 1, "router-1"),
    ):
        part = made.part(kind, at, "127.0.0.2")
        assert part.name == name
        config = serve_config(part.arguments, {})
        assert (config.cluster.role, config.launch.launcher, config.cluster.nodes) == (kind, "local", None)
        assert config.engine.max_num_seqs == 4
    node = serve_config(made.part("node", 1, "127.0.0.2").arguments, {})
    assert (node.host, node.port, node.cluster.cluster_listen) == ("127.0.0.2", 0, Address("127.0.0.2", 0))
    assert (node.engine.peers.listen, node.cluster.coordinator) == (
        Address("127.0.0.2", 0),
        Address("127.0.0.1", 7000),
    )
    router = serve_config(made.part("router", 1, "127.0.0.1").arguments, {})
    assert (router.host, router.port, router.cluster.routers) == ("0.0.0.0", 9001, 2)


def test_nodes_serve_http_to_other_machines_only_if_routers_do(trust: list[str]) -> None:
    arguments = [*RAY, "--nodes", "1", *trust]
    made = service(arguments, serve_config(arguments, {}))
    assert serve_config(made.part("node", 0, "127.0.0.2").arguments, {}).host == "127.0.0.1"


def test_a_file_that_asks_for_ray_may_be_shared_with_the_members(tmp_path: Path, trust: list[str]) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('nodes = 2\nlauncher = "ray"\nray_spread = true\n')
    arguments = ["--config", str(file), *trust]
    config = serve_config(arguments, {})
    assert (config.launch.launcher, config.launch.ray_spread) == ("ray", True)
    node = serve_config(service(arguments, config).part("node", 0, "127.0.0.1").arguments, {})
    assert node.launch.launcher == "local"


def test_a_scaler_is_told_what_it_needs_and_runs_from_the_same_files_as_members(
    tmp_path: Path, trust: list[str]
) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('nodes = "1:4"\nlauncher = "ray"\nray_spread = true\nrouters = 2\n')
    arguments = ["--config", str(file), "--shrink-after-s", "9", *trust]
    config = serve_config(arguments, {})
    made = service(arguments, config)
    scaled = made.scaled(config.cluster.node_range, config.launch, "10.0.0.1:6379")
    part = scaled.part("scaler", 0, "10.0.0.1")
    assert (part.name, part.module) == ("scaler", "engine.cluster.launching.ray_scaler")
    told = serve_config(part.arguments, {})
    assert (told.launch.scale, told.launch.shrink_after_s) == (config.cluster.nodes, 9)
    assert told.launch.ray_address == Address("10.0.0.1", 6379)
    assert told.engine.peers.token_file == config.engine.peers.token_file
    assert scaled.part("node", 0, "10.0.0.2") == made.part("node", 0, "10.0.0.2")


def test_a_node_takes_gpus_where_there_are_any(trust: list[str]) -> None:
    arguments = [*RAY, "--nodes", "1", *trust]
    config = serve_config(arguments, {})
    assert service(arguments, config).bundle == {"CPU": 2}
    assert service(arguments, config, gpus=4).bundle == {"CPU": 2, "GPU": 4}


@pytest.mark.parametrize(
    ("arguments", "environ", "named"),
    [
        (["--api-key", "sesame"], {}, r"^api_key='\(hidden\)' .*--api-key-file"),
        (["--admin-key=sesame"], {}, r"^admin_key='\(hidden\)' .*--admin-key-file"),
        (["--lora", "a=https://host/a.zip?signature=sesame"], {}, r"^lora='\(hidden\)' .*--config"),
        ([], {"LORASERVE_API_KEY": "sesame"}, r"^api_key='\(hidden\)' .*--api-key-file"),
    ],
)
def test_a_secret_that_ray_would_tell_is_refused(
    arguments: list[str], environ: dict[str, str], named: str, trust: list[str]
) -> None:
    line = [*RAY, "--nodes", "1", *arguments, *trust]
    with pytest.raises(InvalidConfig, match=named) as refusal:
        refuse_secrets(line, environ, serve_config(line, environ))
    assert "sesame" not in str(refusal.value)


def test_secrets_in_files_are_taken_and_none_is_in_what_ray_is_given(
    tmp_path: Path, trust: list[str]
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("sesame-of-the-clients\n")
    arguments = [*RAY, "--nodes", "1", "--api-key-file", str(keys), *trust]
    environ = {"LORASERVE_PEER_TOKEN": "another-token-of-16"}
    config = serve_config(arguments, environ)
    refuse_secrets(arguments, environ, config)
    given = pickle.dumps(service(arguments, config))
    assert not [each for each in (b"sesame", b"a-token-of-sixteen", b"another-token") if each in given], (
        "a secret would be seen"
    )


def test_a_token_in_the_environment_alone_is_refused() -> None:
    line, environ = [*RAY, "--nodes", "1", "--peer-plain"], {"LORASERVE_PEER_TOKEN": "a-token-of-sixteen"}
    with pytest.raises(InvalidConfig, match=r"^LORASERVE_PEER_TOKEN='\(hidden\)' .*--peer-token-file"):
        refuse_secrets(line, environ, serve_config(line, environ))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([*RAY], r"^nodes=None .*--status, --stop and --scale"),
        ([*RAY, "--nodes", "2", "--stop"], r"^nodes=2 .*leave --nodes out"),
        ([*RAY, "--status", "--stop"], r"^stop=True .*one thing at a time"),
        ([*RAY, "--scale", "0"], r"^scale=0 .*from 1"),
        ([*RAY, "--status", "--ray-cpus", "2"], r"^ray_cpus=2 .*beside --status"),
        (["--scale", "2"], r"^scale=2 .*without --launcher ray"),
        (["--nodes", "2", "--ray-spread"], r"^ray_spread=True .*without --launcher ray"),
    ],
)
def test_options_of_launching_that_make_no_sense_together_are_refused(
    arguments: list[str], told: str
) -> None:
    with pytest.raises(InvalidConfig, match=told):
        serve_config(arguments, {})


def test_without_the_library_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InvalidConfig, match=r"^launcher='ray' .*scripts/setup ray"):
        RayCluster(None)


def test_the_table_of_members_lines_its_columns_up_and_says_why_one_is_not_ready() -> None:
    members = [
        ActorStatus(
            "coordinator", "ready", "10.0.0.1", "10.0.0.1:7000", "coordinator ready at 10.0.0.1:7000"
        ),
        ActorStatus("node-0", "refused", "10.0.0.2", "", "model=x is not accepted"),
        ActorStatus("node-1", "waiting"),
    ]
    assert table(members) == [
        "role         actor        machine   address        state",
        "coordinator  coordinator  10.0.0.1  10.0.0.1:7000  ready",
        "node         node-0       10.0.0.2  -              refused (model=x is not accepted)",
        "node         node-1       -         -              waiting",
    ]
