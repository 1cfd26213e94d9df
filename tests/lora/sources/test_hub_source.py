"""Tests of adapters from the hub, whose protocol is served from this machine."""

from collections.abc import Generator
from pathlib import Path

import pytest

from lora.errors import AdapterRefused, SourceAbsent
from lora.format.adapter_files import WEIGHTS_FILE
from lora.sources.source_url import SourceUrl
from tests.lora.sources.source_server import SourceServer, cut_after, source_server, status
from tests.lora.sources.test_http_source import make_rig
from tests.lora.store_rig import BASE_SHAPE
from tests.oracles.adapters import write_adapter

pytest.importorskip("huggingface_hub")
MAIN = "/org/repo/resolve/main"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[SourceServer]:
    with source_server(tmp_path / "hub") as running:
        write_adapter(running.root / MAIN.lstrip("/"), BASE_SHAPE, 4, 1)
        write_adapter(running.root / "org/repo/resolve/v2", BASE_SHAPE, 4, 2)
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


def test_a_repository_is_served_by_its_revision(tmp_path: Path, hub: SourceServer) -> None:
    rig = make_rig(tmp_path, hub, prefix="hf://org")
    for name, seed in (("hf://org/repo", 1), ("hf://org/repo@v2", 2)):
        found = rig.store.registry.load("a", SourceUrl.parse(name))
        assert found.digest == rig.load(seed, "local").digest


def test_a_download_from_the_hub_goes_on_where_it_was_cut(tmp_path: Path, hub: SourceServer) -> None:
    rig = make_rig(tmp_path, hub, prefix="hf://org")
    weights = f"{MAIN}/{WEIGHTS_FILE}"
    cut = cut_after(hub, 1000)
    hub.faults[weights] = lambda request, content: (cut if request.method == "GET" else hub.whole)(
        request, content
    )
    found = rig.store.registry.load("a", SourceUrl.parse("hf://org/repo"))
    assert found.digest == rig.load(1, "local").digest
    assert [wanted for wanted in hub.ranges_of(weights) if wanted] == ["bytes=1000-"]


def test_what_the_hub_has_not_is_absent_and_what_fails_may_pass(tmp_path: Path, hub: SourceServer) -> None:
    registry = make_rig(tmp_path, hub, prefix="hf://org").store.registry
    with pytest.raises(SourceAbsent):
        registry.load("a", SourceUrl.parse("hf://org/nothing"))
    hub.faults[f"{MAIN}/{WEIGHTS_FILE}"] = status(503)
    with pytest.raises(AdapterRefused) as refusal:
        registry.load("a", SourceUrl.parse("hf://org/repo"))
    assert refusal.value.may_pass
