"""A server whose files hang stops when it is told to: nobody waits for what never comes."""

import json
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.oracles.adapters import base_shape, write_adapter

ENOUGH_S = 120
PROGRAM = """
import os, sys, threading
opened = os.open
def hang(path, *arguments, **keywords):
    if "hung" in str(path):
        print("hangs", flush=True)
        threading.Event().wait()
    return opened(path, *arguments, **keywords)
os.open = hang
from engine.api.server import listener
from engine.serve import main
listener._SHUTDOWN_S = 0.5  # rather than 5 s, which is waited twice for what never comes
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_server_with_files_that_hang_stops_with_0(tmp_path: Path) -> None:
    write_adapter(tmp_path / "hung", base_shape(), 8, seed=1)
    options = ["--port", "0", "--no-progress", "--lora-root", str(tmp_path)]
    command = [sys.executable, "-c", PROGRAM, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        assert server.stdout is not None
        try:
            address = server.stdout.readline().split()[2].removesuffix(":")
            asking = threading.Thread(target=_load, args=(address,))
            asking.start()
            assert "hangs" in server.stdout.readline()
            server.send_signal(signal.SIGTERM)
            assert server.wait(ENOUGH_S) == 0
            asking.join(ENOUGH_S)
        finally:
            server.kill()


def _load(address: str) -> None:
    body = json.dumps({"lora_name": "a", "lora_path": "hung"}).encode()
    request = urllib.request.Request(f"{address}/v1/load_lora_adapter", body)
    try:
        urllib.request.urlopen(request, timeout=ENOUGH_S).close()
    except (OSError, urllib.error.HTTPError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
