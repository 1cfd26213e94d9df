"""What goes wrong between two hosts, and how every pull ends all the same: exact bytes or one named error, in time.

Puller and source are processes in network namespaces; the router between them slows, cuts and heals the link. Both
network paths are put through it: the TLS stream, and UCX over plain TCP, its weakest footing (the source's processor
takes part, nothing notices a frozen peer, and a read once begun cannot be stopped).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from scripts.certificates import make_certificates
from tests.transport.forger_process import ProcessForger
from tests.transport.node_setup import MIB, Setup
from tests.transport.pullers import Outcome, ProcessPuller
from tests.transport.sources import ProcessSource
from tests.transport.two_hosts import NORTH, SOUTH, NamespacesForbidden, TwoHosts

NBYTES = 8 * MIB
OFFSET = 12_345
SLOW = "40mbit"  # NBYTES take 1.7 s
DEADLINE_S = 4.0
GRACE_S = 10.0  # for a machine that has other work
WAIT_S = 60.0

UCX_OVER_TCP = {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "up0"}
needs_nixl = pytest.mark.skipif(
    find_spec("nixl_cu12") is None, reason="NIXL (the extra `ucx`) is not installed"
)


@pytest.fixture(scope="module")
def hosts() -> Iterator[TwoHosts]:
    try:
        built = TwoHosts.build()
    except NamespacesForbidden as reason:
        pytest.skip(str(reason))
    yield built
    built.tear_down()


@dataclass
class Stage:
    """Starts nodes on either host, alike but for what a test changes, and ends them all."""

    hosts: TwoHosts
    setup: Setup
    environment: dict[str, str]

    def __post_init__(self) -> None:
        self._ends: list[Callable[[], None]] = []

    def source(self, setup: Setup | None = None) -> ProcessSource:
        """A source in the south that publishes NBYTES from OFFSET as "adapter"."""
        chosen = replace(setup or self.setup, host=SOUTH)
        source = ProcessSource(chosen, self.hosts.launcher(self.hosts.south), self.environment)
        self._ends.append(source.child.kill)
        source.publish("adapter", [(OFFSET, NBYTES)])
        return source

    def puller(self, setup: Setup | None = None) -> ProcessPuller:
        """A puller in the north."""
        chosen = replace(setup or self.setup, host=NORTH)
        puller = ProcessPuller(chosen, self.hosts.launcher(self.hosts.north), self.environment)
        self._ends.append(puller.child.kill)
        return puller

    def forger(self, source: ProcessSource, forgery: str) -> ProcessForger:
        """An impostor in the south that tells of the source's memory, with one thing forged."""
        setup = replace(self.setup, host=SOUTH)
        launcher = self.hosts.launcher(self.hosts.south)
        forger = ProcessForger(setup, source.address, forgery, launcher, self.environment)
        self._ends.append(forger.child.kill)
        return forger

    def end(self) -> None:
        for end in self._ends:
            end()


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return make_certificates(tmp_path_factory.mktemp("certificates"), [NORTH, SOUTH])


@pytest.fixture(params=["stream", pytest.param("ucx", marks=needs_nixl)])
def stage(request: pytest.FixtureRequest, hosts: TwoHosts, tls: tuple[str, ...]) -> Iterator[Stage]:
    ucx = request.param == "ucx"
    setup = Setup(arena_bytes=NBYTES + MIB, tls=tls, ucx=ucx, open_network=ucx, path=request.param)
    built = Stage(hosts, setup, UCX_OVER_TCP if ucx else {})
    hosts.heal()
    hosts.shape("1gbit")
    yield built
    hosts.heal()
    built.end()


def begin_slowly(
    stage: Stage, puller: ProcessPuller, source: ProcessSource, timeout_s: float = DEADLINE_S
) -> None:
    """Start a pull over a slow link, and return in the middle of it."""
    warm = puller.pull(source.address, "adapter", NBYTES)
    assert warm.error is None
    puller.reuse()
    stage.hosts.shape(SLOW)
    puller.begin(source.address, "adapter", NBYTES, timeout_s)
    assert puller.first_byte(WAIT_S)


def ended_in_time(outcome: Outcome, *errors: str) -> bool:
    return outcome.error in errors and outcome.took_s < DEADLINE_S + GRACE_S


def pulls_exactly(puller: ProcessPuller, source: ProcessSource) -> bool:
    puller.reuse()
    return puller.pull(source.address, "adapter", NBYTES).error is None and puller.exact(OFFSET, NBYTES)


def holds_nothing(puller: ProcessPuller, source: ProcessSource) -> bool:
    """No pin and no destination is left at either end."""
    source.withdraw("adapter")
    usage = puller.usage()
    return (
        source.is_drained("adapter", WAIT_S)
        and source.usage().leases == usage.destinations == usage.quarantined == 0
    )


@pytest.mark.slow
def test_a_slow_link_delivers_exactly(stage: Stage) -> None:
    source, puller = stage.source(), stage.puller()
    begin_slowly(stage, puller, source, timeout_s=WAIT_S)
    assert puller.result().error is None
    assert puller.exact(OFFSET, NBYTES)
    assert holds_nothing(puller, source)


def test_source_killed(stage: Stage) -> None:
    source, other, puller = stage.source(), stage.source(), stage.puller()
    begin_slowly(stage, puller, source)
    source.child.kill()
    assert ended_in_time(puller.result(), "PeerGone")
    assert puller.settled(WAIT_S)
    stage.hosts.shape("1gbit")
    assert pulls_exactly(puller, other)
    assert holds_nothing(puller, other)


@pytest.mark.slow
def test_source_frozen_then_thawed(stage: Stage) -> None:
    source, puller = stage.source(), stage.puller()
    begin_slowly(stage, puller, source)
    source.child.stop()
    assert ended_in_time(puller.result(), "PullTimeout")
    stopped = stage.setup.path == "stream"  # a stream ends with its connection; a read through UCX may go on
    assert puller.settled(1.0) == stopped
    assert puller.usage().quarantined == (not stopped)
    source.child.resume()
    assert puller.settled(WAIT_S)
    puller.reuse()
    source.withdraw("adapter")
    assert source.is_drained("adapter", WAIT_S)
    assert puller.untouched()
    stage.hosts.shape("1gbit")
    source.publish("adapter", [(OFFSET, NBYTES)])
    assert pulls_exactly(puller, source)
    assert holds_nothing(puller, source)


def test_source_restarted_at_its_address(stage: Stage) -> None:
    source, puller = stage.source(), stage.puller()
    assert pulls_exactly(puller, source)
    source.child.kill()
    again = stage.source(replace(stage.setup, port=source.address.port))
    assert again.address == source.address
    assert pulls_exactly(puller, again)
    assert holds_nothing(puller, again)


@pytest.mark.slow
def test_source_evicts_during_a_pull(stage: Stage) -> None:
    source, puller = stage.source(), stage.puller()
    begin_slowly(stage, puller, source, timeout_s=WAIT_S)
    assert not source.withdraw("adapter")
    assert puller.result().error is None
    assert puller.exact(OFFSET, NBYTES)
    assert source.is_drained("adapter", WAIT_S)
    assert puller.pull(source.address, "adapter", NBYTES).error == "NotOffered"


@pytest.mark.slow
def test_source_takes_its_pages_back_when_the_lease_is_over(stage: Stage) -> None:
    source, puller = stage.source(replace(stage.setup, most_hold_s=1.0)), stage.puller()
    begin_slowly(stage, puller, source, timeout_s=WAIT_S)
    source.withdraw("adapter")
    assert source.is_drained("adapter", WAIT_S)
    source.scribble(OFFSET, NBYTES)
    assert ended_in_time(puller.result(), "LeaseExpired", "PullTimeout", "PeerGone")
    stage.hosts.shape("1gbit")
    assert puller.settled(WAIT_S)
    assert source.usage().leases == 0


@pytest.mark.slow
def test_link_cut_and_healed(stage: Stage) -> None:
    source, puller = stage.source(replace(stage.setup, most_hold_s=2 * DEADLINE_S)), stage.puller()
    begin_slowly(stage, puller, source)
    stage.hosts.cut()
    assert ended_in_time(puller.result(), "PullTimeout", "PeerGone")
    source.withdraw("adapter")
    assert source.is_drained("adapter", WAIT_S)
    stage.hosts.heal()
    stage.hosts.shape("1gbit")
    assert puller.settled(WAIT_S)
    source.publish("adapter", [(OFFSET, NBYTES)])
    assert pulls_exactly(puller, source)
    assert holds_nothing(puller, source)


def test_reader_frozen_then_thawed(stage: Stage) -> None:
    source, puller = stage.source(replace(stage.setup, most_hold_s=1.0)), stage.puller()
    begin_slowly(stage, puller, source, timeout_s=WAIT_S)
    puller.child.stop()
    source.withdraw("adapter")
    assert source.is_drained("adapter", WAIT_S)
    source.scribble(OFFSET, NBYTES)
    puller.child.resume()
    assert puller.result().error in ("LeaseExpired", "PullTimeout", "PeerGone")
    stage.hosts.shape("1gbit")
    assert puller.settled(WAIT_S)
    assert source.usage().leases == 0


def test_a_slow_reader_keeps_nobody_else_waiting(stage: Stage) -> None:
    source, slow, quick = stage.source(), stage.puller(), stage.puller()
    begin_slowly(stage, slow, source, timeout_s=WAIT_S)
    slow.child.stop()
    stage.hosts.shape("1gbit")
    for _ in range(3):
        assert pulls_exactly(quick, source)
    assert source.usage().leases <= 1  # a stream's last bytes may wait in the kernel, which needs no pin
    slow.child.resume()
    assert slow.result().error is None
    assert slow.exact(OFFSET, NBYTES)
    assert holds_nothing(slow, source)


@pytest.mark.slow
def test_a_puller_shuts_down_though_its_source_is_frozen(stage: Stage) -> None:
    source, puller = stage.source(), stage.puller()
    begin_slowly(stage, puller, source)
    source.child.stop()
    assert ended_in_time(puller.result(), "PullTimeout")
    puller.child.close()
    source.child.resume()
    source.withdraw("adapter")
    assert source.is_drained("adapter", WAIT_S)
    assert source.usage().leases == 0


def test_reader_killed(stage: Stage) -> None:
    source, puller = stage.source(), stage.puller()
    begin_slowly(stage, puller, source, timeout_s=WAIT_S)
    puller.child.kill()
    source.withdraw("adapter")
    assert source.is_drained("adapter", WAIT_S / 2)
    assert source.usage().endings["gone"] == 1
    source.publish("adapter", [(OFFSET, NBYTES)])
    stage.hosts.shape("1gbit")
    another = stage.puller()
    assert pulls_exactly(another, source)
    assert holds_nothing(another, source)


def test_wrong_token(stage: Stage) -> None:
    source, stranger = (
        stage.source(),
        stage.puller(replace(stage.setup, token="not the token of this cluster")),
    )
    assert ended_in_time(stranger.pull(source.address, "adapter", NBYTES), "HelloRefused")
    assert stranger.untouched()
    assert holds_nothing(stranger, source)


def is_found_out(stage: Stage, forgery: str, error: str) -> bool:
    """A forgery ends the pull in time with the error that names it, and disturbs neither end."""
    source, puller = stage.source(), stage.puller()
    forger = stage.forger(source, forgery)
    outcome = puller.pull(forger.address, "adapter", NBYTES)
    forger.child.close()
    return (
        ended_in_time(outcome, error)
        and puller.settled(WAIT_S)
        and pulls_exactly(puller, source)
        and holds_nothing(puller, source)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("forgery", "error"),
    [
        ("a truncated grant", "PeerGone"),
        ("a negative span", "WireError"),
        ("a larger span", "RegionRefused"),
        ("another node's memory", "WireError"),
    ],
)
def test_a_forged_grant(stage: Stage, forgery: str, error: str) -> None:
    assert is_found_out(stage, forgery, error)


@pytest.mark.parametrize("stage", ["stream"], indirect=True)
@pytest.mark.parametrize(
    ("forgery", "error"),
    [("more bytes than granted", "WireError"), ("fewer bytes than announced", "PeerGone")],
)
def test_a_stream_of_another_length(stage: Stage, forgery: str, error: str) -> None:
    assert is_found_out(stage, forgery, error)


@pytest.mark.slow
@needs_nixl
@pytest.mark.parametrize("stage", ["ucx"], indirect=True)
@pytest.mark.parametrize(
    ("forgery", "error"),
    [
        ("truncated metadata", "WireError"),
        ("damaged metadata", "WireError"),
        ("memory that is not registered", "PeerGone"),
        ("memory past the end", "PeerGone"),
    ],
)
def test_forged_metadata_of_memory(stage: Stage, forgery: str, error: str) -> None:
    assert is_found_out(stage, forgery, error)


def test_certificate_of_another_authority(stage: Stage, tmp_path: Path) -> None:
    foreign = make_certificates(tmp_path, [NORTH, SOUTH])
    source, stranger = stage.source(), stage.puller(replace(stage.setup, tls=foreign))
    assert ended_in_time(stranger.pull(source.address, "adapter", NBYTES), "HelloRefused")
    impostor = stage.puller(replace(stage.setup, tls=(stage.setup.tls[0], *foreign[1:])))
    assert ended_in_time(impostor.pull(source.address, "adapter", NBYTES), "HelloRefused")
    assert pulls_exactly(stage.puller(), source)


@needs_nixl
def test_without_a_common_fabric_bytes_take_the_stream(hosts: TwoHosts, tls: tuple[str, ...]) -> None:
    stage = Stage(hosts, Setup(arena_bytes=NBYTES + MIB, tls=tls, ucx=True), {})
    hosts.heal()
    hosts.shape("1gbit")
    source, puller = stage.source(), stage.puller()
    assert pulls_exactly(puller, source)
    assert puller.usage().pulled_bytes == {"stream": NBYTES}
    insisting = stage.puller(replace(stage.setup, path="ucx"))
    assert insisting.pull(source.address, "adapter", NBYTES).error == "PathUnavailable"
    stage.end()
