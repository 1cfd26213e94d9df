"""A short trial by harm: processes of a live cluster are killed, ended and halted, and clients see only answers."""

import json

import pytest

from scripts.chaos.__main__ import main

SHORT = (
    *("--nodes", "2", "--routers", "1", "--adapters", "16", "--words", "2", "--tokens", "64"),
    *("--rate", "4", "--ttft", "120", "--seed", "1"),
)


@pytest.mark.slow
def test_clients_lose_nothing_while_processes_are_killed_ended_and_halted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = main([*SHORT, "--seconds", "8", "--every", "1.5"])
    told = json.loads(capsys.readouterr().out)
    assert told["faults"] > 0
    assert told["right"] == told["requests"] > 10
    assert code == 0
