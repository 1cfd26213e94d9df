"""Tests of adapters from S3, against moto's server on this machine; left out where s3fs or moto is not installed."""

import sys
from collections.abc import Generator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from lora.errors import AdapterRefused, SourceAbsent
from lora.sources.allowed_sources import AllowedSources
from lora.sources.source_folders import SourceOptions
from lora.sources.source_url import SourceUrl
from tests.lora.store_rig import BASE_SHAPE, StoreRig
from tests.oracles.adapters import write_adapter

BUCKET = "bucket"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Generator[Any]:
    pytest.importorskip("s3fs")
    moto_server = pytest.importorskip("moto.server")
    boto3: Any = pytest.importorskip("boto3")
    server = moto_server.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "key-hunter1"), ("AWS_SECRET_ACCESS_KEY", "hunter2"), ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
    ):  # fmt: skip
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)
    yield client
    client.close()
    server.stop()


def upload(client: Any, folder: Path, key: str) -> None:
    for file in folder.iterdir():
        client.put_object(Bucket=BUCKET, Key=f"{key}/{file.name}", Body=file.read_bytes())


def make_rig(tmp_path: Path, **options: Any) -> StoreRig:
    allowed = AllowedSources.of(["s3://bucket/team"], "s3://bucket/team/{name}")
    return StoreRig(tmp_path, 4, sources=SourceOptions(allowed, folder=tmp_path / "fetched", **options))


@pytest.mark.filterwarnings("ignore")  # of the libraries' own
def test_an_adapter_is_served_from_s3(tmp_path: Path, store: Any) -> None:
    rig = make_rig(tmp_path)
    upload(store, write_adapter(tmp_path / "up", BASE_SHAPE, 4, 1), "team/one")
    expected = rig.load(1, "local").digest
    registry = rig.store.registry
    assert registry.load("a", SourceUrl.parse("s3://bucket/team/one")).digest == expected
    assert registry.resolve("one").digest == expected
    upload(store, write_adapter(tmp_path / "up", BASE_SHAPE, 4, 2), "team/one")
    assert registry.load("a", SourceUrl.parse("s3://bucket/team/one")).digest == rig.load(2, "local").digest


@pytest.mark.filterwarnings("ignore")
def test_faults_of_s3_are_told_without_credentials(
    tmp_path: Path, store: Any, caplog: pytest.LogCaptureFixture
) -> None:
    registry = make_rig(tmp_path, most_bytes=100).store.registry
    with pytest.raises(SourceAbsent):
        registry.load("a", SourceUrl.parse("s3://bucket/team/nothing"))
    upload(store, write_adapter(tmp_path / "up", BASE_SHAPE, 4, 1), "team/large")
    with pytest.raises(AdapterRefused, match="at most 100 are fetched"):
        registry.load("a", SourceUrl.parse("s3://bucket/team/large"))
    with pytest.raises(AdapterRefused, match="--lora-source"):
        registry.load("a", SourceUrl.parse("s3://bucket/team-b/one"))
    assert "hunter" not in caplog.text


@pytest.mark.filterwarnings("ignore")
def test_a_part_that_is_here_is_gone_on_with(
    tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3fs: Any = pytest.importorskip("s3fs")
    upload(store, write_adapter(tmp_path / "up", BASE_SHAPE, 4, 1), "team/one")
    url, whole, reads = SourceUrl.parse("s3://bucket/team/one"), s3fs.core.S3File._fetch_range, list[int]()

    def cut(self: Any, start: int, end: int) -> bytes:
        reads.append(start)
        if start:
            raise OSError("the connection was cut")
        return whole(self, 0, 1000)

    with monkeypatch.context() as patch:
        patch.setattr(s3fs.core.S3File, "_fetch_range", cut)
        with pytest.raises(AdapterRefused, match="what came is kept") as refusal:
            make_rig(tmp_path, timeout_s=20.0).store.registry.load("a", url)
        assert refusal.value.may_pass
        assert "was cut" not in str(refusal.value)
    reads.clear()

    def note(self: Any, start: int, end: int) -> bytes:
        reads.append(start)
        return whole(self, start, end)

    monkeypatch.setattr(s3fs.core.S3File, "_fetch_range", note)
    rig = make_rig(tmp_path)
    assert rig.store.registry.load("a", url).digest == rig.load(1, "local").digest
    assert reads == [1000]


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_scheme_whose_package_is_missing_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(import_module("fsspec.registry")._registry, scheme, raising=False)
    allowed = AllowedSources.of([f"{scheme}://bucket"])
    rig = StoreRig(tmp_path, 4, sources=SourceOptions(allowed))
    with pytest.raises(AdapterRefused, match=f"pip install {package}") as refusal:
        rig.store.registry.load("a", SourceUrl.parse(f"{scheme}://bucket/one"))
    assert not refusal.value.may_pass
    rig.store.close()


@pytest.mark.parametrize("scheme", ["ftp", "memory", "nothing", "local"])
def test_what_adapters_are_not_fetched_by_is_refused_by_name(tmp_path: Path, scheme: str) -> None:
    rig = StoreRig(tmp_path, 4, sources=SourceOptions(AllowedSources.of([f"{scheme}://host"])))
    with pytest.raises(AdapterRefused, match=f"{scheme}://"):
        rig.store.registry.load("a", SourceUrl.parse(f"{scheme}://host/one"))
    rig.store.close()
