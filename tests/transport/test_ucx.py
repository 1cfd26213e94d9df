"""The UCX path's own duties: damaged metadata never reaches NIXL, and no pull mixes devices."""

import hashlib
import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from transport.base import RemoteRegion
from transport.errors import PathUnavailable, RegionRefused, WireError
from transport.paths import nixl_agent
from transport.paths.choice import open_paths
from transport.paths.nixl_agent import NixlAgent
from transport.paths.ucx import UcxPath, decode_metadata, encode_metadata, one_device

needs_nixl = pytest.mark.skipif(
    find_spec("nixl_cu12") is None, reason="NIXL (the extra `ucx`) is not installed"
)


@pytest.mark.parametrize(
    "damaged",
    [
        "",
        "host",
        "host\n00",
        "host\n00\n%%%",
        "host\n00\nbWV0\nmore",
        encode_metadata("host", b"metadata").replace(hashlib.sha256(b"metadata").hexdigest(), "00"),
        encode_metadata("host", b"metadata").replace("bWV0", "bWV1"),
        encode_metadata("host", b"metadata")[:-5],
    ],
)
def test_damaged_metadata_is_refused(damaged: str) -> None:
    with pytest.raises(WireError):
        decode_metadata(damaged)


def test_whole_metadata_is_decoded() -> None:
    assert decode_metadata(encode_metadata("host", b"metadata")) == b"metadata"


def remote(device: int) -> RemoteRegion:
    return RemoteRegion("node", 1, 4096, 1, device, 7)


def test_devices_are_not_mixed_in_one_pull() -> None:
    assert one_device([remote(0), remote(0)]) == 0
    with pytest.raises(RegionRefused, match="each device"):
        one_device([remote(-1), remote(0)])


@pytest.fixture(scope="module")
def path() -> Iterator[UcxPath]:
    built = UcxPath("test")
    yield built
    built.close()


@needs_nixl
def test_metadata_that_nixl_cannot_read_is_refused_even_with_the_right_digest(path: UcxPath) -> None:
    assert decode_metadata(path.metadata())
    agent = NixlAgent("other")
    metadata = agent.metadata()
    for damaged in (b"", b"\x00" * 64, metadata[: len(metadata) // 2], b"x" + metadata):
        with pytest.raises(WireError, match="damaged UCX metadata"):
            path._begin_with(encode_metadata("host", damaged))  # pyright: ignore[reportPrivateUsage]
    assert path._begin_with(encode_metadata("host", metadata)) == agent.name  # pyright: ignore[reportPrivateUsage]
    agent.close()


@needs_nixl
def test_ucx_is_kept_off_the_network_unless_that_is_chosen(path: UcxPath) -> None:
    assert "lo" in os.environ["UCX_NET_DEVICES"].split(",")
    assert path.reaches(path.capabilities())
    assert not path.reaches("no capabilities")
    assert not path.reaches('{"host": "elsewhere", "infiniband": true, "open_network": true}')


def test_without_nixl_the_stream_is_left_and_insisting_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nixl_agent, "BINDINGS", ("nixl_of_nowhere._bindings",))
    with pytest.raises(PathUnavailable, match="scripts/setup ucx"):
        open_paths("test", "ucx")
    assert [path.name for path in open_paths("test")] == ["stream"]


@needs_nixl
def test_ucx_is_preferred_where_it_starts() -> None:
    paths = open_paths("test")
    assert [path.name for path in paths] == ["ucx", "stream"]
    for path in paths:
        path.close()


def test_a_path_that_does_not_exist_is_refused() -> None:
    assert [path.name for path in open_paths("test", "stream")] == ["stream"]
    with pytest.raises(ValueError, match="'window': choose one of auto, ucx, stream"):
        open_paths("test", "window")
