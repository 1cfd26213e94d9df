"""Every peer that has an adapter hangs: a load ends when its deadlines are over, one clear line each, and works again
once they go on. Both network doors, with sources that are stopped and resumed."""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from lora.format.packed import Module, PackedLayout, digest_of, packed_layout
from lora.memory.pages import RankPages
from lora.peers.directory import StaticDirectory
from lora.peers.loop_thread import LoopThread
from lora.peers.manifest import weights_name
from lora.peers.peer_tier import PeerTier
from lora.peers.puller import Puller, PullLimits
from lora.peers.regions import ManifestBuffers, PageRegions
from tests.oracles.adapters import base_shape
from tests.transport.pattern import content
from tests.transport.rig import Sources, needs_nixl
from tests.transport.sources import ProcessSource
from transport.network import NetworkTransport

HOLDERS = 3
PATIENCE_S = 0.5
GRACE_S = 20.0  # for a machine that has other work
WAIT_S = 30.0


@dataclass
class Fleet:
    """A node that lacks one adapter, and the sources that have it."""

    sources: tuple[ProcessSource, ...]
    transport: NetworkTransport
    tier: PeerTier
    digest: str
    layout: PackedLayout
    rows: torch.Tensor

    def brings_exactly(self) -> bool:
        self.rows.zero_()
        return self.tier.fetch(self.digest, self.rows) and torch.equal(self.rows, self.true_rows())

    def true_rows(self) -> torch.Tensor:
        return torch.from_numpy(content(0, self.layout.nbytes))

    def pins_nothing(self) -> bool:
        for source in self.sources:
            source.withdraw(weights_name(self.digest))
        drained = [source.is_drained(weights_name(self.digest), WAIT_S) for source in self.sources]
        usage = self.transport.memory.usage()
        return all(drained) and usage.destinations == usage.quarantined == 0


@pytest.fixture(params=["stream", pytest.param("ucx", marks=needs_nixl)])
def fleet(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Fleet]:
    setup = Sources(tmp_path).setup(request.param)
    layout = packed_layout(
        base_shape(), torch.float32, [Module(layer, "q_proj", 8, 1.0) for layer in range(2)]
    )
    digest = digest_of(layout, torch.from_numpy(content(0, layout.nbytes)))
    sources = tuple(ProcessSource(setup) for _ in range(HOLDERS))
    for source in sources:
        source.publish(weights_name(digest), [(0, layout.nbytes)])
    loop = LoopThread()

    async def opened() -> NetworkTransport:
        return setup.open("node")

    transport = loop.wait(opened())
    pages = RankPages(64, 4096)
    puller = Puller(
        transport,
        ManifestBuffers(transport, 1 << 16),
        PullLimits(patience_s=PATIENCE_S, slowest_bytes_per_s=1e9, backoff_s=0.0),
    )
    directory = StaticDirectory(tuple(source.address for source in sources))
    tier = PeerTier("base", transport, loop, PageRegions(transport, pages), directory, puller)
    tier.remember(digest, layout)
    yield Fleet(sources, transport, tier, digest, layout, pages.arena[: layout.nbytes])
    loop.wait(transport.close())
    loop.close()
    for source in sources:
        source.child.kill()


@pytest.mark.parametrize("known", [True, False], ids=["connected before", "never met"])
def test_every_holder_hangs_and_goes_on(fleet: Fleet, known: bool, caplog: pytest.LogCaptureFixture) -> None:
    if known:
        assert fleet.brings_exactly()
    for source in fleet.sources:
        source.child.stop()
    began_s = time.monotonic()
    with caplog.at_level(logging.WARNING, logger="lora.peers.peer_tier"):
        assert not fleet.tier.fetch(fleet.digest, fleet.rows)
    assert time.monotonic() - began_s < HOLDERS * PATIENCE_S + GRACE_S
    lines = [record.message for record in caplog.records if record.name == "lora.peers.peer_tier"]
    assert len(lines) == HOLDERS
    for line, source in zip(lines, fleet.sources, strict=True):
        assert str(source.address) in line
        assert "no answer in time" in line
    assert fleet.tier.stats.failed == HOLDERS
    for source in fleet.sources:
        source.child.resume()
    assert fleet.brings_exactly()
    assert fleet.pins_nothing()


def test_one_holder_of_many_goes_on(fleet: Fleet) -> None:
    for source in fleet.sources[:-1]:
        source.child.stop()
    assert fleet.brings_exactly()
    assert fleet.tier.stats.failed == HOLDERS - 1
    for source in fleet.sources[:-1]:
        source.child.resume()
    assert fleet.pins_nothing()
