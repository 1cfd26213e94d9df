"""The UCX door's own duties: damaged metadata never reaches NIXL, and pieces never mix devices."""

import base64
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
from transport.paths.ucx import READ_BYTES, READ_PIECES, UcxPath, _batches, _metadata_of

needs_nixl = pytest.mark.skipif(
    find_spec("nixl_cu12") is None, reason="NIXL (the extra `ucx`) is not installed"
)


def card(metadata: bytes, digest: str | None = None) -> str:
    right = hashlib.sha256(metadata).hexdigest()
    return "\n".join(("host", digest or right, base64.b64encode(metadata).decode()))


@pytest.mark.parametrize(
    "damaged",
    [
        "",
        "host",
        "host\n00",
        "host\n00\n%%%",
        "host\n00\nbWV0\nmore",
        card(b"metadata", digest="00"),
        card(b"metadata").replace("bWV0", "bWV1"),
        card(b"metadata")[:-5],
    ],
)
def test_a_damaged_card_is_refused(damaged: str) -> None:
    with pytest.raises(WireError):
        _metadata_of(damaged)


def test_a_whole_card_is_opened() -> None:
    assert _metadata_of(card(b"metadata")) == b"metadata"


def remote(nbytes: int, device: int = -1, address: int = 4096) -> RemoteRegion:
    return RemoteRegion("node", 1, address, nbytes, device, 7)


def test_reads_are_small_enough_to_give_up() -> None:
    regions = [remote(READ_BYTES * 5 // 2), remote(1), remote(READ_BYTES), *(remote(3) for _ in range(1000))]
    batches = list(_batches(regions, regions))  # pyright: ignore[reportArgumentType]  (only address and size matter)
    assert all(local == other for local, other in batches)
    sizes = [[nbytes for _, nbytes in local.pieces] for local, _ in batches]
    assert all(sum(batch) <= READ_BYTES and len(batch) <= READ_PIECES for batch in sizes)
    assert sum(map(sum, sizes)) == sum(region.nbytes for region in regions)


def test_devices_are_not_mixed_in_one_pull() -> None:
    regions = [remote(1), remote(1, device=0)]
    with pytest.raises(RegionRefused, match="each device"):
        list(_batches(regions, regions))  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def door() -> Iterator[UcxPath]:
    built = UcxPath("test")
    yield built
    built.close()


@needs_nixl
def test_metadata_that_nixl_cannot_read_is_refused_even_with_the_right_digest(door: UcxPath) -> None:
    assert _metadata_of(door.card())
    agent = NixlAgent("other")
    metadata = agent.metadata()
    for damaged in (b"", b"\x00" * 64, metadata[: len(metadata) // 2], b"x" + metadata):
        with pytest.raises(WireError, match="damaged UCX metadata"):
            door._meet(card(damaged))
    assert door._meet(card(metadata)) == agent.name
    agent.close()


@needs_nixl
def test_ucx_is_kept_off_the_network_unless_that_is_chosen(door: UcxPath) -> None:
    assert "lo" in os.environ["UCX_NET_DEVICES"].split(",")
    assert door.reaches(door.offer())
    assert not door.reaches("not an offer")
    assert not door.reaches('{"host": "elsewhere", "infiniband": true, "open_network": true}')


def test_without_nixl_the_stream_is_left_and_insisting_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nixl_agent, "BINDINGS", ("nixl_of_nowhere._bindings",))
    with pytest.raises(PathUnavailable, match="loraserve\\[ucx\\]"):
        open_paths("test", "ucx")
    assert [door.name for door in open_paths("test")] == ["stream"]


@needs_nixl
def test_ucx_is_preferred_where_it_starts() -> None:
    doors = open_paths("test")
    assert [door.name for door in doors] == ["ucx", "stream"]
    for door in doors:
        door.close()


def test_a_door_that_does_not_exist_is_refused() -> None:
    assert [door.name for door in open_paths("test", "stream")] == ["stream"]
    with pytest.raises(ValueError, match="'window': choose one of auto, ucx, stream"):
        open_paths("test", "window")
