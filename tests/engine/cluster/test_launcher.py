"""The processes of a cluster that one command starts."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from engine.cluster.launching.local_launcher import plan
from engine.config.command_line import serve_config
from engine.config.peer_config import PEER_TOKEN_VARIABLE
from engine.errors import InvalidConfig


def values_of(option: str, arguments: Sequence[str]) -> list[str]:
    return [arguments[at + 1] for at, word in enumerate(arguments) if word == option]


@pytest.mark.parametrize(("asked", "routers"), [("9000", ["9000", "9001"]), ("0", ["0", "0"])])
def test_every_router_has_a_grpc_port_of_its_own_and_no_node_takes_one(
    asked: str, routers: list[str]
) -> None:
    arguments = ["--nodes", "1", "--routers", "2", "--grpc-port", asked]
    parts = {part.name: part.arguments for part in plan(arguments, serve_config(arguments, {})).parts}
    told = {name: values_of("--grpc-port", said) for name, said in parts.items()}
    assert told == {"coordinator": [], "node-0": ["0"], "router-0": routers[:1], "router-1": routers[1:]}


def test_without_the_option_no_process_speaks_grpc_to_clients() -> None:
    arguments = ["--nodes", "1"]
    parts = plan(arguments, serve_config(arguments, {})).parts
    assert not [part for part in parts if "--grpc-port" in part.arguments]


def test_files_and_batches_are_kept_by_the_router() -> None:
    arguments = ["--nodes", "2", "--batch-dir", "kept"]
    parts = {part.name: part.arguments for part in plan(arguments, serve_config(arguments, {})).parts}
    told = {name: values_of("--batch-dir", said) for name, said in parts.items()}
    assert told == {"coordinator": [], "node-0": [], "node-1": [], "router-0": ["kept"]}


@pytest.mark.parametrize(
    "others",
    [("--nodes", "2", "--routers", "2"), ("--role", "node", "--coordinator", "127.0.0.1:1", "--peer-plain")],
)
def test_files_and_batches_are_refused_where_nobody_would_find_them(others: tuple[str, ...]) -> None:
    with pytest.raises(InvalidConfig, match=r"^batch_dir=.*router"):
        serve_config(["--batch-dir", "kept", *others], {PEER_TOKEN_VARIABLE: "x" * 32})


def test_a_range_of_nodes_begins_with_the_least_and_no_member_is_told_of_it() -> None:
    arguments = ["--nodes=2:5", "--grow-after-s", "3", "--shrink-after-s=60"]
    config = serve_config(arguments, {})
    assert (config.cluster.node_range.lowest, config.cluster.node_range.highest) == (2, 5)
    parts = plan(arguments, config).parts
    assert [part.name for part in parts] == ["coordinator", "node-0", "node-1", "router-0"]
    words = {word for part in parts for word in part.arguments}
    assert not words & {"--nodes=2:5", "--grow-after-s", "3", "--shrink-after-s=60"}


@pytest.mark.parametrize(
    "nodes", ["0", "0:2", "3:2", "2:", ":2", "1:2:3", "a:b", "-1:2", "1.5", "1:99999999999"]
)
def test_a_range_that_is_none_is_refused(nodes: str) -> None:
    with pytest.raises(InvalidConfig, match=r"^nodes=.*MIN:MAX"):
        serve_config([f"--nodes={nodes}"], {})


@pytest.mark.parametrize(
    "others", [(), ("--nodes", "3"), ("--nodes", "3:3"), ("--launcher", "ray", "--scale", "3")]
)
def test_patience_where_the_number_is_fixed_is_refused(others: tuple[str, ...]) -> None:
    with pytest.raises(
        InvalidConfig, match=r"^grow_after_s=3.0 is not accepted: the number of nodes is fixed"
    ):
        serve_config(["--grow-after-s", "3", *others], {})


def test_what_a_file_says_of_the_start_is_left_out_where_a_service_that_runs_is_changed(
    tmp_path: Path,
) -> None:
    file = tmp_path / "serve.toml"
    file.write_text(
        'launcher = "ray"\nnodes = "2:3"\nrouters = 2\nray_spread = true\nray_wait_s = 7\ngrow_after_s = 5\n'
    )
    shared = ["--config", str(file)]
    assert serve_config([*shared, "--status"], {}).launch.status
    fixed = serve_config([*shared, "--scale", "2"], {}).launch
    assert (fixed.scale, fixed.ray_wait_s, fixed.ray_spread) == (2, 7, False)
    assert serve_config([*shared, "--scale", "2:4"], {}).launch.grow_after_s == 5
    with pytest.raises(InvalidConfig, match=r"^nodes=2 .*leave --nodes out"):
        serve_config([*shared, "--stop", "--nodes", "2"], {})
