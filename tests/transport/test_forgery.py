"""Strangers and liars: whatever they send, the honest end answers with one named error and goes on serving."""

import asyncio
import ctypes
import json
import socket
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict

import pytest

from tests.transport.asynchronous import asynchronous
from tests.transport.impostor import (
    SOON_S,
    Forge,
    Impostor,
    Lie,
    damaged,
    elsewhere,
    leased,
    soon,
    with_metadata,
)
from tests.transport.node_setup import TOKEN, Setup
from tests.transport.pattern import content
from tests.transport.rig import needs_nixl
from tests.transport.sources import ProcessSource
from transport.base import Address, Arena, Memory, RemoteRegion
from transport.control.connection import Connection
from transport.control.messages import (
    LENGTH,
    VERSION,
    Bytes,
    Grant,
    Hello,
    LeaseReleased,
    LeaseRequest,
    Proof,
    Read,
    Refusal,
    ReleaseLease,
    encode,
    error_of,
)
from transport.control.security import Authenticator, Security
from transport.errors import HelloRefused, LeaseExpired, PeerGone, RegionRefused, TransportError, WireError
from transport.network import NetworkTransport
from transport.paths.ucx import Reach

NBYTES = 4096


def memory() -> Memory:
    owner = ctypes.create_string_buffer(b"\xa5" * NBYTES, NBYTES)
    return Memory(ctypes.addressof(owner), NBYTES, owner=owner)


@contextmanager
def connected(address: Address) -> Generator[socket.socket]:
    with socket.create_connection((address.host, address.port), SOON_S) as sock:
        yield sock


def answers_until_it_hangs_up(sock: socket.socket) -> bytes:
    """All that comes; a reset ends it like a good-bye."""
    answer = b""
    try:
        while some := sock.recv(65_536):
            answer += some
    except ConnectionResetError:
        pass
    return answer


async def lease_and_pull(puller: NetworkTransport, peer: Address, arena: Arena) -> None:
    lease = await puller.lease(peer, "adapter", SOON_S)
    await puller.pull(lease, [arena.region(0, NBYTES)], SOON_S)


async def serves_honest_pullers(source: NetworkTransport) -> bool:
    puller = Setup().open("puller")
    target = memory()
    await lease_and_pull(puller, source.address, puller.register(target))
    await puller.close()
    # The source's end of the lease may come a little later.
    unpinned = asyncio.wrap_future(source.memory.withdraw("adapter"))
    await asyncio.wait_for(unpinned, SOON_S)
    return bytes(target.view()) == b"\xa5" * NBYTES and source.memory.usage().leases == 0


def frame(body: bytes) -> bytes:
    return LENGTH.pack(len(body)) + body


HELLO = encode(Hello(VERSION, "stranger", "00"))


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x00\x00\x00\x00",
        b"\xff" * 64,
        HELLO[:3],
        HELLO[:-4],
        frame(b"[]"),
        frame(b"{" * 500),
        frame(b'{"kind":"Hello"}'),
        frame(b'{"kind":"Hello","version":"1","node":"x","nonce":"y"}'),
        encode(Hello(VERSION + 1, "from the future", "00")),
        encode(LeaseRequest("adapter", 1.0, "stream")),
        encode(Read()),
        HELLO + encode(Proof("00" * 32)),
        HELLO + encode(Proof("ünicode")),
        HELLO + encode(LeaseRequest("adapter", 1.0, "stream")),
        HELLO + encode(Refusal("HelloRefused", "no, you")),
    ],
    ids=lambda said: repr(said)[:50],
)
@asynchronous
async def test_a_stranger_gets_no_lease_and_disturbs_nobody(said: bytes) -> None:
    source = Setup().open("source")
    source.memory.publish("adapter", [source.register(memory()).region(0, NBYTES)])
    with connected(source.address) as sock:
        sock.sendall(said)
        with suppress(OSError):  # it may have hung up already
            sock.shutdown(socket.SHUT_WR)
        answer = await asyncio.to_thread(answers_until_it_hangs_up, sock)
    assert b"Welcome" not in answer
    assert b"Grant" not in answer
    assert await serves_honest_pullers(source)
    await source.close()


@asynchronous
async def test_a_node_of_another_version_is_told_which_one_to_update() -> None:
    source = Setup().open("source")
    with connected(source.address) as sock:
        sock.sendall(frame(b'{"kind":"Hello","version":2,"node":"old","nonce":"00"}'))
        answer = await asyncio.to_thread(answers_until_it_hangs_up, sock)
    refusal = json.loads(answer[LENGTH.size :])
    assert (refusal["kind"], refusal["error"]) == ("Refusal", "HelloRefused")
    assert refusal["detail"].startswith(f"version 2 meets {VERSION} at ")
    assert refusal["detail"].endswith("update the older node")
    await source.close()


def trusted(source: NetworkTransport) -> Connection:
    return Authenticator(Security(TOKEN), "liar").dial(source.address.host, source.address.port, soon())[0]


@pytest.mark.parametrize(
    "said",
    [
        encode(Read()),
        encode(ReleaseLease(read=True, confirm=True)),
        encode(Hello(VERSION, "again", "00")),
        frame(b'{"kind":"LeaseRequest","name":"adapter","hold_s":NaN,"path":"stream"}'),
        frame(b'{"kind":"LeaseRequest","name":"adapter","hold_s":-1,"path":"stream"}'),
        frame(b'{"kind":"LeaseRequest","name":["adapter"],"hold_s":1,"path":"stream"}'),
        encode(LeaseRequest("adapter", 1.0, "stream")) + encode(Hello(VERSION, "again", "00")),
        encode(LeaseRequest("adapter", 1.0, "stream")) + frame(b"{}"),
        encode(LeaseRequest("adapter", 1.0, "stream"))[:-3],
    ],
    ids=lambda said: repr(said)[:90],
)
@asynchronous
async def test_a_liar_within_the_cluster_ends_only_its_own_connection(said: bytes) -> None:
    source = Setup().open("source")
    source.memory.publish("adapter", [source.register(memory()).region(0, NBYTES)])
    connection = await asyncio.to_thread(trusted, source)
    connection.send_bytes(memoryview(said), soon())
    connection.abort()
    connection.close()
    source.memory.withdraw("adapter")
    assert await serves_after_republishing(source)
    await source.close()


async def serves_after_republishing(source: NetworkTransport) -> bool:
    source.memory.publish("adapter", [source.register(memory()).region(0, NBYTES)])
    return await serves_honest_pullers(source)


@asynchronous
async def test_an_unknown_path_is_refused_and_the_connection_goes_on() -> None:
    source = Setup().open("source")
    source.memory.publish("adapter", [source.register(memory()).region(0, NBYTES)])
    connection = await asyncio.to_thread(trusted, source)
    for request in (LeaseRequest("adapter", 1.0, "window"), LeaseRequest("absent", 1.0, "stream")):
        connection.send(request, soon())
        with pytest.raises(TransportError):
            await asyncio.to_thread(connection.receive, soon())
    connection.send(LeaseRequest("adapter", 1.0, "stream"), soon())
    assert isinstance(await asyncio.to_thread(connection.receive, soon()), Grant)
    connection.close()
    await source.close()


def region(nbytes: int = NBYTES, node: str = "impostor", key: int = 7) -> RemoteRegion:
    return RemoteRegion(node, 1, 4096, nbytes, -1, key)


def grants(*regions: RemoteRegion) -> Lie:
    return lambda connection: connection.send(Grant(7, 60.0, "", regions), soon())


def says(said: bytes) -> Lie:
    return lambda connection: connection.send_bytes(memoryview(said), soon())


def then_sends(announced: int, sent: int) -> Lie:
    def lie(connection: Connection) -> None:
        connection.send(Grant(7, 60.0, "", (region(),)), soon())
        connection.expect(Read, soon())
        connection.send(Bytes(announced), soon())
        connection.send_bytes(memoryview(b"x" * sent), soon())

    return lie


def grants_then_says(said: bytes) -> Lie:
    def lie(connection: Connection) -> None:
        connection.send(Grant(7, 60.0, "", (region(),)), soon())
        connection.expect(Read, soon())
        connection.send_bytes(memoryview(said), soon())

    return lie


NEGATIVE = encode(Grant(7, 60.0, "", (region(),)))[LENGTH.size :].replace(b'"nbytes":4096', b'"nbytes":-4096')


@pytest.mark.parametrize(
    ("lie", "error"),
    [
        (grants(region(node="another")), WireError),
        (grants(region(key=8)), WireError),
        (grants(region(NBYTES + 1)), RegionRefused),
        (grants(region(NBYTES), region(1)), RegionRefused),
        (grants(region(1 << 60)), RegionRefused),
        (grants(), RegionRefused),
        (says(frame(NEGATIVE)), WireError),
        (says(frame(NEGATIVE[:40])), WireError),
        (says(b"\x00\x00"), PeerGone),
        (says(b""), PeerGone),
        (says(encode(LeaseReleased())), WireError),
        (then_sends(NBYTES + 1, NBYTES + 1), WireError),
        (then_sends(NBYTES - 1, NBYTES - 1), WireError),
        (then_sends(NBYTES, NBYTES - 1), PeerGone),
        (grants_then_says(encode(Refusal("LeaseExpired", "sorry"))), LeaseExpired),
        (grants_then_says(b"\xff" * (NBYTES + LENGTH.size)), WireError),
        (grants_then_says(encode(LeaseReleased())), WireError),
        (grants_then_says(b""), PeerGone),
    ],
)
@asynchronous
async def test_a_lying_source_is_found_out(lie: Lie, error: type[TransportError]) -> None:
    impostor, puller = Impostor(lie), Setup().open("puller")
    arena = puller.register(memory())
    with pytest.raises(error):
        await lease_and_pull(puller, impostor.address, arena)
    await asyncio.wait_for(asyncio.wrap_future(puller.memory.settled(arena.region(0, NBYTES))), SOON_S)
    await puller.close()
    impostor.close()


@asynchronous
async def test_a_lease_that_is_over_has_expired_though_the_source_is_silent() -> None:
    hold_s = 0.2

    def lie(connection: Connection) -> None:
        connection.send(Grant(7, hold_s, "", (region(),)), soon())
        connection.receive(soon())

    impostor, puller = Impostor(lie), Setup().open("puller")
    arena = puller.register(memory())
    lease = await puller.lease(impostor.address, "adapter", hold_s)
    await asyncio.sleep(hold_s)
    with pytest.raises(LeaseExpired, match="lease it for longer"):
        await puller.pull(lease, [arena.region(0, NBYTES)], SOON_S)
    assert puller.memory.usage().destinations == 0
    await puller.close()
    impostor.close()


@asynchronous
async def test_a_source_without_the_token_is_told_nothing() -> None:
    impostor = Impostor(grants(region()), Security("another token altogether"))
    puller = Setup().open("puller")
    with pytest.raises(HelloRefused, match="wrong token"):
        await puller.lease(impostor.address, "adapter", SOON_S)
    await puller.close()
    impostor.close()


def relays(source: ProcessSource, forge: Forge) -> Lie:
    """What a real source in another process grants, but for what `forge` makes of it."""

    def lie(connection: Connection) -> None:
        with leased(source.address, Security(TOKEN), "ucx") as grant:
            connection.send(forge(grant), soon())
            with suppress(TransportError):
                connection.receive(soon())

    return lie


@pytest.fixture(scope="module")
def real_source() -> Iterator[ProcessSource]:
    source = ProcessSource(Setup(arena_bytes=4 * NBYTES, ucx=True, path="ucx"))
    source.publish("adapter", [(NBYTES, NBYTES)])
    yield source
    source.withdraw("adapter")
    assert source.is_drained("adapter", SOON_S)
    source.child.close()


@needs_nixl
@pytest.mark.parametrize(
    ("forge", "error"),
    [
        (elsewhere(1 << 40), PeerGone),
        (elsewhere(3 * NBYTES), PeerGone),
        (elsewhere(3 * NBYTES - 1), PeerGone),
        (elsewhere(-NBYTES - 1), PeerGone),
        (with_metadata(lambda metadata: ""), WireError),
        (with_metadata(lambda metadata: metadata[: len(metadata) // 2]), WireError),
        (with_metadata(lambda metadata: metadata.replace("A", "B")), WireError),
        (with_metadata(damaged), WireError),
    ],
)
@asynchronous
async def test_forged_metadata_of_memory_crashes_neither_end(
    real_source: ProcessSource, forge: Forge, error: type[TransportError]
) -> None:
    reach = Reach.of_this_machine(open_network=False)
    impostor = Impostor(relays(real_source, forge), capabilities={"ucx": json.dumps(asdict(reach))})
    puller, target = Setup(ucx=True, path="ucx").open("puller"), memory()
    arena = puller.register(target)
    with pytest.raises(error):
        await puller.fetch(impostor.address, "adapter", [arena.region(0, NBYTES)], SOON_S)
    await asyncio.wait_for(asyncio.wrap_future(puller.memory.settled(arena.region(0, NBYTES))), SOON_S)
    impostor.close()
    await puller.fetch(real_source.address, "adapter", [arena.region(0, NBYTES)], SOON_S)
    assert bytes(target.view()) == content(NBYTES, NBYTES).tobytes()
    await puller.close()


def test_a_refusal_keeps_its_words() -> None:
    assert str(error_of(Refusal("HelloRefused", "wrong token"))) == "wrong token"
