"""Two servers as an operator starts them: one pulls from the other what it lacks, follows it, and outlives it."""

import shutil
import signal
from contextlib import suppress
from pathlib import Path

import openai
import pytest

from engine.demo.embedded import DEMO_BASE, adapter_folders
from engine.serve import main
from lora.target_modules import OUTER_SITES
from model.checkpoint_files import read_config
from tests.e2e.peer_server import TOKEN, Server, serving
from tests.oracles.adapters import write_adapter
from tests.transport.rig import needs_nixl

FOLLOW_S = 30  # reviews come every fifth of a second; a busy machine needs its time


def tenant(root: Path, name: str, task: str) -> Path:
    """The folder ROOT/NAME with the adapter of a task, which no server knows by that name."""
    shutil.copytree(adapter_folders()[task], root / name)
    return root / name


@pytest.mark.slow
def test_a_second_server_pulls_what_it_lacks_and_follows_and_outlives_the_first(tmp_path: Path) -> None:
    """What is pulled is resident, displaced, or declared but never read: `rot` does not fit beside `tenant`."""
    folders = tmp_path / "known"
    tenant(folders, "lazy", "mask")
    loaded = ["--lora", f"tenant={tenant(tmp_path, 'tenant', 'reverse')}"]
    loaded += ["--lora", f"rot={tenant(tmp_path, 'rot', 'rot13')}", "--lora-dir", str(folders)]
    loaded += ["--adapter-bytes", "512KiB", "--no-self-test", "--lora-root", str(tmp_path)]
    with (
        serving(tmp_path, *loaded) as first,
        serving(tmp_path, "--peer", first.peer_address, "--peer-refresh-s", "0.2") as second,
    ):
        pulls_from_anywhere(second, first)
        follows(second, first, tenant(tmp_path, "other", "upper"))
        outlives(second, first)
        assert second.stop(signal.SIGTERM) == 0


@pytest.mark.slow
def test_adapters_on_head_and_embedding_answer_alike_where_they_were_pulled(tmp_path: Path) -> None:
    base, loras = read_config(DEMO_BASE).base_shape(), list[str]()
    for site in OUTER_SITES:
        folder = write_adapter(tmp_path / site, base, 12, 3, [site], lora_alpha=100)
        loras += ["--lora", f"{site}={folder}"]
    with serving(tmp_path, *loras) as first, serving(tmp_path, "--peer", first.peer_address) as second:
        for pulls, site in enumerate(OUTER_SITES, start=1):
            assert second.ask(site) == first.ask(site) != first.ask("demo")
            assert second.metric("loraserve_peer_pulls_total") == pulls


def pulls_from_anywhere(second: Server, first: Server) -> None:
    with pytest.raises(openai.NotFoundError, match="ghost"):
        second.ask("ghost")
    assert second.ask("tenant") == "tenalp"
    assert second.metric("loraserve_peer_pulls_total") == 1
    assert second.metric('loraserve_adapter_hits_total{tier="peer"}') == 1
    assert second.metric('loraserve_adapter_tier_seconds_total{tier="peer"}') > 0
    assert second.ask("rot") == "cynarg"
    assert second.ask("lazy") == "pl*n*t"
    assert second.metric("loraserve_peer_pulls_total") == 3
    assert first.metric("loraserve_published_copies_total") >= 1
    assert first.metric("loraserve_adapter_evictions_total") == 0, "peers displace nothing"


def follows(second: Server, first: Server, other: Path) -> None:
    """A reload and an unload at the owner."""
    assert first.post("/v1/load_lora_adapter", {"lora_name": "tenant", "lora_path": str(other)}) == 200
    assert first.ask("tenant") == "PLANET"
    assert second.answers_within(FOLLOW_S, lambda: second.ask("tenant") == "PLANET")
    assert first.post("/v1/unload_lora_adapter", {"lora_name": "tenant"}) == 200
    assert second.answers_within(FOLLOW_S, lambda: is_unknown(second, "tenant"))


def outlives(second: Server, first: Server) -> None:
    pulls = second.metric("loraserve_peer_pulls_total")
    first.stop(signal.SIGKILL)
    assert second.ask("rot", "orbit") == "beovg"
    assert second.metric("loraserve_peer_pulls_total") == pulls
    with pytest.raises(openai.InternalServerError, match="1 of 1 peers did not answer") as refusal:
        second.ask("other")
    assert refusal.value.status_code == 503
    assert second.ask("demo") == "planet"


@needs_nixl
@pytest.mark.slow
def test_servers_of_one_host_read_each_others_memory(tmp_path: Path) -> None:
    folder = tenant(tmp_path, "tenant", "reverse")
    insisting = ("--peer-path", "ucx")  # a pull by any other way would fail
    with (
        serving(tmp_path, "--lora", f"tenant={folder}", *insisting) as first,
        serving(tmp_path, "--peer", first.peer_address, *insisting) as second,
    ):
        assert second.ask("tenant") == "tenalp"
        assert second.metric("loraserve_peer_pulls_total") == 1
        assert second.stop(signal.SIGTERM) == 0
        assert first.ask("tenant", "orbit") == "tibro"
        assert first.stop(signal.SIGTERM) == 0


def is_unknown(server: Server, name: str) -> bool:
    """Whether the server answers 404 to the name."""
    with suppress(openai.NotFoundError):
        server.ask(name)
        return False
    return True


def test_sharing_without_a_token_or_in_the_clear_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN)
    base = ["--port", "0", "--no-progress", "--peer-path", "stream"]
    with_token = ["--peer-token-file", str(token)]
    refusals = {
        ("--peer", "127.0.0.1:9", "--peer-plain"): "peer_token_file",
        ("--peer", "127.0.0.1:9", *with_token): "peer_tls_cert",
        ("--peer-listen", "0.0.0.0:0", "--peer-plain", *with_token): "peer_listen",
    }
    for arguments, field in refusals.items():
        assert main([*base, *arguments]) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"python -m engine.serve: {field}=")
        assert told.count("\n") == 1
        assert TOKEN not in told
