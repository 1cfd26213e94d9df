"""The processes of a cluster that one command starts."""

from collections.abc import Sequence

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
    parts = {part.name: part.arguments for part in plan(arguments, serve_config(arguments, {}))}
    told = {name: values_of("--grpc-port", said) for name, said in parts.items()}
    assert told == {"coordinator": [], "node-0": ["0"], "router-0": routers[:1], "router-1": routers[1:]}


def test_without_the_option_no_process_speaks_grpc_to_clients() -> None:
    arguments = ["--nodes", "1"]
    parts = plan(arguments, serve_config(arguments, {}))
    assert not [part for part in parts if "--grpc-port" in part.arguments]


def test_files_and_batches_are_kept_by_the_router() -> None:
    arguments = ["--nodes", "2", "--batch-dir", "kept"]
    parts = {part.name: part.arguments for part in plan(arguments, serve_config(arguments, {}))}
    told = {name: values_of("--batch-dir", said) for name, said in parts.items()}
    assert told == {"coordinator": [], "node-0": [], "node-1": [], "router-0": ["kept"]}


@pytest.mark.parametrize(
    "others",
    [("--nodes", "2", "--routers", "2"), ("--role", "node", "--coordinator", "127.0.0.1:1", "--peer-plain")],
)
def test_files_and_batches_are_refused_where_nobody_would_find_them(others: tuple[str, ...]) -> None:
    with pytest.raises(InvalidConfig, match=r"^batch_dir=.*router"):
        serve_config(["--batch-dir", "kept", *others], {PEER_TOKEN_VARIABLE: "x" * 32})
