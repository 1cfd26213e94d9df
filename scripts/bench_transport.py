"""The transport's speed beside the raw paths it is made of, in one interleaved run, and what it costs while idle.

    python -m scripts.bench_transport --out results/transport.jsonl

A source process holds the bytes. In every round each path moves each size once, in an order drawn anew each time, since
what the last one left in the cache helps the next: memcpy, process_vm_readv, a plain and a TLS socket as bare as Python
has them, and the transports, each judged by the raw path of its kind. Times of a transport include its lease. Rows are
appended as JSONL; the last thing printed are the tables.
"""

import argparse
import asyncio
import ctypes
import json
import multiprocessing
import os
import random
import socket
import ssl
import statistics
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from scripts.certificates import make_certificates
from transport.base import Address, Arena, Memory, Transport
from transport.control.security import Security, TlsFiles
from transport.loopback import LoopbackNetwork, LoopbackTransport
from transport.network import NetworkOptions, NetworkTransport
from transport.paths.choice import open_paths

KIB, MIB = 1 << 10, 1 << 20
SIZES = (4 * KIB, 64 * KIB, MIB, 16 * MIB, 64 * MIB, 256 * MIB)
LARGEST = max(SIZES)
HOST = "127.0.0.1"
TOKEN = "a token of the benchmark"
IDLE_S = 10.0
HOLD_S = 60.0
REQUEST = struct.Struct(">Q")
RAW_OF = {
    "loopback": "memcpy",
    "ucx": "process_vm_readv",
    "plain stream": "socket",
    "TLS stream": "TLS socket",
}
ALSO_BESIDE = {"TLS stream": "socket"}  # what TLS costs is no fault of the stream, but it is a cost

Move = Callable[[int], Awaitable[None]]


@dataclass(frozen=True)
class SourceAddresses:
    """Where the source process can be read, path by path."""

    pid: int
    memory: int
    raw: int
    raw_tls: int
    transports: dict[str, int]


def context(files: Sequence[str], server: bool) -> ssl.SSLContext:
    """TLS 1.3 with certificates at both ends, as the transport has it."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.load_verify_locations(files[0])
    made.load_cert_chain(files[1], files[2])
    made.verify_mode = ssl.CERT_REQUIRED
    return made


def open_node(name: str, kind: str, files: Sequence[str]) -> NetworkTransport:
    """A node that offers one door only."""
    authority, certificate, key = map(Path, files)
    tls = TlsFiles(authority, certificate, key) if kind == "TLS stream" else None
    setting = "ucx" if kind == "ucx" else "stream"
    options = NetworkOptions(Security(TOKEN, tls), Address(HOST, 0), setting)
    return NetworkTransport(name, options, open_paths(name, setting))


def publish_all(node: Transport, memory: Memory) -> None:
    """Lend every size under its number."""
    arena = node.register(memory)
    for nbytes in SIZES:
        node.memory.publish(str(nbytes), [arena.region(0, nbytes)])


def as_memory(array: np.ndarray) -> Memory:
    """The array's bytes."""
    return Memory(array.ctypes.data, array.nbytes, owner=array)


def serve_raw(listener: socket.socket, wrap: ssl.SSLContext | None, view: memoryview) -> None:
    """Answer each request for n bytes with n bytes, for one reader."""
    sock, _ = listener.accept()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with wrap.wrap_socket(sock, server_side=True) if wrap else sock as wrapped:
        while request := wrapped.recv(REQUEST.size):
            wrapped.sendall(view[: REQUEST.unpack(request)[0]])


def start_raw(view: memoryview, wrap: ssl.SSLContext | None) -> int:
    """The port of a raw server."""
    listener = socket.create_server((HOST, 0))
    threading.Thread(target=serve_raw, args=(listener, wrap, view), daemon=True).start()
    return listener.getsockname()[1]


def source_main(control: Connection, kinds: Sequence[str], files: Sequence[str]) -> None:
    """The source process: raw servers and one node per kind, until told to end."""
    content = np.arange(LARGEST // 8, dtype=np.int64)
    view = as_memory(content).view()
    nodes = {kind: open_node("source", kind, files) for kind in kinds}
    for node in nodes.values():
        publish_all(node, as_memory(content))
    raw, raw_tls = start_raw(view, None), start_raw(view, context(files, server=True))
    addresses = {kind: node.address.port for kind, node in nodes.items()}
    control.send(SourceAddresses(os.getpid(), content.ctypes.data, raw, raw_tls, addresses))
    while control.recv() == "cpu":
        control.send(time.process_time())
    for node in nodes.values():
        asyncio.run(node.close())


@contextmanager
def source_process(
    kinds: Sequence[str], files: Sequence[str]
) -> Iterator[tuple[SourceAddresses, Connection]]:
    """A source in a fresh process."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=source_main, args=(theirs, kinds, files))
    process.start()
    theirs.close()  # so that its death is seen
    yield ours.recv(), ours
    ours.send("end")
    process.join()


def memcpy_move(target: np.ndarray) -> Move:
    """A copy within this process."""
    origin = np.arange(LARGEST // 8, dtype=np.int64)

    async def move(nbytes: int) -> None:
        ctypes.memmove(target.ctypes.data, origin.ctypes.data, nbytes)

    return move


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def readv_move(target: np.ndarray, source: SourceAddresses) -> Move:
    """The kernel copies from the source's memory to ours."""
    libc = ctypes.CDLL(None, use_errno=True)

    async def move(nbytes: int) -> None:
        local = _Iovec(target.ctypes.data, nbytes)
        remote = _Iovec(source.memory, nbytes)
        got = libc.process_vm_readv(source.pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
        if got != nbytes:
            raise OSError(ctypes.get_errno(), f"process_vm_readv read {got} of {nbytes} bytes")

    return move


def socket_move(target: np.ndarray, port: int, wrap: ssl.SSLContext | None) -> Move:
    """Blocking calls on one connection."""
    sock = socket.create_connection((HOST, port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    wrapped = wrap.wrap_socket(sock, server_hostname=HOST) if wrap else sock
    view = as_memory(target).view()

    async def move(nbytes: int) -> None:
        wrapped.sendall(REQUEST.pack(nbytes))
        got = 0
        while got < nbytes:
            got += wrapped.recv_into(view[got:nbytes])

    return move


def transport_move(puller: Transport, arena: Arena, peer: Address) -> Move:
    """Lease and pull."""

    async def move(nbytes: int) -> None:
        await puller.fetch(peer, str(nbytes), [arena.region(0, nbytes)], HOLD_S)

    return move


def loopback_move(target: np.ndarray) -> Move:
    """Two nodes of this process."""
    network = LoopbackNetwork()
    origin = np.arange(LARGEST // 8, dtype=np.int64)
    source, puller = LoopbackTransport("source", network), LoopbackTransport("puller", network)
    publish_all(source, as_memory(origin))
    return transport_move(puller, puller.register(as_memory(target)), source.address)


async def race(rounds: int, files: Sequence[str], out: Path) -> list[dict]:
    """Every path, every size, round after round."""
    kinds = [kind for kind in RAW_OF if kind != "loopback"]
    target = np.ones(LARGEST // 8, np.int64)
    expected = np.arange(LARGEST // 8, dtype=np.int64)
    rows = []
    with source_process(kinds, files) as (source, _):
        pullers = {kind: open_node("puller", kind, files) for kind in kinds}
        moves: dict[str, Move] = {
            "memcpy": memcpy_move(target),
            "loopback": loopback_move(target),
            "process_vm_readv": readv_move(target, source),
            "socket": socket_move(target, source.raw, None),
            "TLS socket": socket_move(target, source.raw_tls, context(files, server=False)),
        }
        for kind, puller in pullers.items():
            peer = Address(HOST, source.transports[kind])
            moves[kind] = transport_move(puller, puller.register(as_memory(target)), peer)
        chance = random.Random(0)
        for number in range(-1, rounds):  # the first round warms up
            for nbytes in SIZES:
                for path, move in chance.sample(list(moves.items()), len(moves)):
                    target[:8] = -1
                    start_s = time.perf_counter()
                    await move(nbytes)
                    took_s = time.perf_counter() - start_s
                    if number < 0 and not np.array_equal(target[: nbytes // 8], expected[: nbytes // 8]):
                        raise AssertionError(f"{path} moved {nbytes} bytes wrongly")
                    if number >= 0:
                        rows.append(
                            {"what": "move", "path": path, "nbytes": nbytes, "round": number, "s": took_s}
                        )
        for puller in pullers.values():
            await puller.close()
    append(out, rows)
    return rows


async def idle(kind: str, files: Sequence[str], out: Path) -> dict:
    """Processor time of both ends of one connected pair of nodes that has nothing to do."""
    target = np.ones(LARGEST // 8, np.int64)
    with source_process([kind], files) as (source, control):
        puller = open_node("puller", kind, files)
        move = transport_move(
            puller, puller.register(as_memory(target)), Address(HOST, source.transports[kind])
        )
        await move(MIB)
        control.send("cpu")
        source_s, puller_s, start_s = control.recv(), time.process_time(), time.perf_counter()
        await asyncio.sleep(IDLE_S)
        puller_s = time.process_time() - puller_s
        control.send("cpu")
        source_s, waited_s = control.recv() - source_s, time.perf_counter() - start_s
        await puller.close()
    row = {
        "what": "idle",
        "path": kind,
        "source_share": source_s / waited_s,
        "puller_share": puller_s / waited_s,
    }
    append(out, [row])
    return row


def append(out: Path, rows: Sequence[dict]) -> None:
    """Keep the rows."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def table(rows: Sequence[dict]) -> Iterator[str]:
    """Medians by path and size; for a transport also its share of the speed of the raw path, or of two."""
    times: dict[tuple[str, int], list[float]] = defaultdict(list)
    for row in rows:
        times[row["path"], row["nbytes"]].append(row["s"])
    middle = {key: statistics.median(seconds) for key, seconds in times.items()}
    yield "| path | " + " | ".join(_size(nbytes) for nbytes in SIZES) + " |"
    yield "|---" * (len(SIZES) + 1) + "|"
    for path in [name for pair in RAW_OF.items() for name in reversed(pair)]:
        cells = []
        for nbytes in SIZES:
            took_s = middle[path, nbytes]
            speed = f"{took_s * 1e6:.0f} µs" if nbytes < MIB else f"{nbytes / took_s / 1e9:.2f} GB/s"
            beside = [raw[path] for raw in (RAW_OF, ALSO_BESIDE) if path in raw]
            shares = ", ".join(f"{middle[raw, nbytes] / took_s:.0%}" for raw in beside)
            cells.append(f"{speed} ({shares})" if shares else speed)
        yield f"| {path} | " + " | ".join(cells) + " |"


def _size(nbytes: int) -> str:
    for unit, name in ((MIB, "MiB"), (KIB, "KiB")):
        if nbytes >= unit:
            return f"{nbytes // unit} {name}"
    return f"{nbytes} B"


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("results/transport.jsonl"))
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        files = make_certificates(Path(folder), [HOST])
        print(*table(asyncio.run(race(arguments.rounds, files, arguments.out))), sep="\n")
        for kind in RAW_OF:
            if kind != "loopback":
                row = asyncio.run(idle(kind, files, arguments.out))
                print(
                    f"idle {kind}: source {row['source_share']:.2%}, puller {row['puller_share']:.2%} of a core"
                )


if __name__ == "__main__":
    main()
