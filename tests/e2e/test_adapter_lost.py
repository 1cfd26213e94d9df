"""An adapter that is gone when its request's turn comes: one clear error that names it, nothing else disturbed, and it
is served again once it can be had."""

import shutil
import signal
import threading
from pathlib import Path

import openai
import pytest

from engine.demo.embedded import adapter_folders
from tests.e2e.peer_server import Server, serving

WEIGHTS = "adapter_model.safetensors"


def assert_unavailable(server: Server, name: str, *, stream: bool = False) -> None:
    """One answer: 503, adapter_unavailable, with the adapter's name."""
    with pytest.raises(openai.InternalServerError, match=rf"adapter '{name}' cannot be brought back") as told:
        server.ask(name, stream=stream)
    assert (told.value.status_code, told.value.code, told.value.param) == (
        503,
        "adapter_unavailable",
        "model",
    )


def assert_idle(server: Server) -> None:
    """No sequence, no block and no request is left."""
    assert server.metric("loraserve_healthy") == 1
    assert server.metric("loraserve_sequences_running") == server.metric("loraserve_sequences_waiting") == 0
    assert server.metric('loraserve_kv_blocks{state="used"}') == 0


@pytest.mark.slow
def test_a_lost_adapter_fails_its_own_requests_and_comes_back(tmp_path: Path) -> None:
    """`rot` is known and not resident; then its packed file goes, and its folder is torn."""
    cache, folders = tmp_path / "cache", {}
    for name, task in (("tenant", "reverse"), ("rot", "rot13")):
        folders[name] = shutil.copytree(adapter_folders()[task], tmp_path / name)
    loras = [f"--lora={name}={folder}" for name, folder in folders.items()]
    tight = ["--adapter-bytes", "512KiB", "--adapter-cache-dir", str(cache), "--no-self-test"]
    with serving(tmp_path, *tight, *loras) as server:
        whole = (folders["rot"] / WEIGHTS).read_bytes()
        (folders["rot"] / WEIGHTS).write_bytes(whole[:1000])
        for packed in cache.iterdir():
            packed.unlink()
        answers: list[str] = []
        others = threading.Thread(target=lambda: answers.extend(server.ask("tenant") for _ in range(8)))
        others.start()
        assert_unavailable(server, "rot")
        # Its name is read afresh from here on, which says what is wrong with the folder.
        with pytest.raises(openai.BadRequestError, match=r"'rot'.*truncated") as told:
            server.ask("rot", stream=True)
        assert told.value.code == "invalid_adapter"
        others.join()
        assert answers == ["tenalp"] * 8
        assert_idle(server)
        assert server.metric('loraserve_requests_finished_total{adapter="rot",reason="error"}') == 1
        (folders["rot"] / WEIGHTS).write_bytes(whole)
        assert server.ask("rot") == "cynarg"
        assert server.ask("tenant") == "tenalp"
        assert_idle(server)


@pytest.mark.slow
def test_an_adapter_whose_source_died_is_lost_only_until_the_source_is_back(tmp_path: Path) -> None:
    """It was pulled, displaced, its file is gone and so is the peer; then the peer starts again."""
    cache = tmp_path / "cache"
    own = shutil.copytree(adapter_folders()["rot13"], tmp_path / "rot")
    lent = shutil.copytree(adapter_folders()["reverse"], tmp_path / "tenant")
    with serving(tmp_path, "--lora", f"tenant={lent}") as first:
        room = ["--adapter-bytes", "512KiB", "--adapter-cache-dir", str(cache), "--peer-refresh-s", "0.2"]
        room.append("--no-self-test")  # it would bring both in, one after the other
        with serving(tmp_path, "--lora", f"rot={own}", "--peer", first.peer_address, *room) as second:
            assert second.ask("tenant", stream=True) == "tenalp"
            assert second.ask("rot") == "cynarg"
            assert second.metric("loraserve_adapter_evictions_total") >= 1
            first.stop(signal.SIGKILL)
            for packed in cache.iterdir():
                packed.unlink()
            assert_unavailable(second, "tenant", stream=True)
            with pytest.raises(openai.InternalServerError, match="1 of 1 peers did not answer") as told:
                second.ask("tenant")
            assert (told.value.status_code, told.value.code) == (503, "peers_silent")
            assert second.ask("rot") == "cynarg"
            with serving(tmp_path, "--lora", f"tenant={lent}", listen=first.peer_address):
                assert second.answers_within(30, lambda: answers(second, "tenant") == "tenalp")
            assert_idle(second)


def answers(server: Server, name: str) -> str | None:
    """What the server says, None while it cannot reach its peers."""
    try:
        return server.ask(name)
    except openai.InternalServerError:
        return None
