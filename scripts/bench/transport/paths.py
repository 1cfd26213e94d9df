"""The ends of the paths that the transport benchmark compares: a source process, and moves into a buffer of this one.

Raw paths are as bare as Python has them; a transport's time includes its lease. Knows nothing of rounds and
rows.
"""

import asyncio
import ctypes
import multiprocessing
import os
import socket
import ssl
import struct
import threading
import time
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scripts.bench.bandwidth import ProcessMemory
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
HOLD_S = 60.0
LENGTH = struct.Struct(">Q")

Buffer = NDArray[np.int64]
Move = Callable[[int], Awaitable[None]]
"""Moves so many bytes from the source into a buffer."""


@dataclass(frozen=True, slots=True)
class SourceAddresses:
    """Where the source process can be read, path by path."""

    pid: int
    memory: int
    raw: int
    raw_tls: int
    transports: dict[str, int]


def tls_context(files: Sequence[str], server: bool) -> ssl.SSLContext:
    """Make a context of TLS 1.3 with certificates at both ends, as the transport has it."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.load_verify_locations(files[0])
    made.load_cert_chain(files[1], files[2])
    made.verify_mode = ssl.CERT_REQUIRED
    return made


def open_node(name: str, kind: str, files: Sequence[str]) -> NetworkTransport:
    """Open a node that offers one data path only."""
    authority, certificate, key = map(Path, files)
    tls = TlsFiles(authority, certificate, key) if kind == "TLS stream" else None
    setting = "ucx" if kind == "ucx" else "stream"
    options = NetworkOptions(Security(TOKEN, tls), Address(HOST, 0), setting)
    return NetworkTransport(name, options, open_paths(name, setting))


def publish_all(node: Transport, memory: Memory) -> None:
    """Publish every size under its number."""
    arena = node.register(memory)
    for nbytes in SIZES:
        node.memory.publish(str(nbytes), [arena.region(0, nbytes)])


def memory_of(array: Buffer) -> Memory:
    """Wrap the array's bytes."""
    return Memory(array.ctypes.data, array.nbytes, owner=array)


def serve_raw(listener: socket.socket, wrap: ssl.SSLContext | None, view: memoryview) -> None:
    """Answer each request for n bytes with n bytes, for one reader."""
    sock, _ = listener.accept()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with wrap.wrap_socket(sock, server_side=True) if wrap else sock as wrapped:
        while request := wrapped.recv(LENGTH.size):
            wrapped.sendall(view[: LENGTH.unpack(request)[0]])


def start_raw(view: memoryview, wrap: ssl.SSLContext | None) -> int:
    """Start a raw server; return its port."""
    listener = socket.create_server((HOST, 0))
    threading.Thread(target=serve_raw, args=(listener, wrap, view), daemon=True).start()
    return listener.getsockname()[1]


def source_main(control: Connection, kinds: Sequence[str], files: Sequence[str]) -> None:
    """Run the source process: raw servers and one node per kind, until told to end."""
    content = np.arange(LARGEST // 8, dtype=np.int64)
    view = memory_of(content).view()
    nodes = {kind: open_node("source", kind, files) for kind in kinds}
    for node in nodes.values():
        publish_all(node, memory_of(content))
    raw, raw_tls = start_raw(view, None), start_raw(view, tls_context(files, server=True))
    addresses = {kind: node.address.port for kind, node in nodes.items()}
    control.send(SourceAddresses(os.getpid(), content.ctypes.data, raw, raw_tls, addresses))
    while control.recv() == "cpu":
        control.send(time.process_time())
    for node in nodes.values():
        asyncio.run(node.close())


@contextmanager
def source_process(
    kinds: Sequence[str], files: Sequence[str]
) -> Generator[tuple[SourceAddresses, Connection], None, None]:
    """Start a source in a fresh process; it ends with the block."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=source_main, args=(theirs, kinds, files))
    process.start()
    theirs.close()  # so that its death is seen
    yield ours.recv(), ours
    ours.send("end")
    process.join()


def memcpy_move(target: Buffer) -> Move:
    """Copy within this process."""
    origin = np.arange(LARGEST // 8, dtype=np.int64)

    async def move(nbytes: int) -> None:
        ctypes.memmove(target.ctypes.data, origin.ctypes.data, nbytes)

    return move


def readv_move(target: Buffer, source: SourceAddresses) -> Move:
    """Have the kernel copy from the source's memory to ours."""
    memory = ProcessMemory(source.pid, source.memory)

    async def move(nbytes: int) -> None:
        memory.read(target.ctypes.data, nbytes)

    return move


def socket_move(target: Buffer, port: int, wrap: ssl.SSLContext | None) -> Move:
    """Read from one connection with blocking calls."""
    sock = socket.create_connection((HOST, port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    wrapped = wrap.wrap_socket(sock, server_hostname=HOST) if wrap else sock
    view = memory_of(target).view()

    async def move(nbytes: int) -> None:
        wrapped.sendall(LENGTH.pack(nbytes))
        got = 0
        while got < nbytes:
            got += wrapped.recv_into(view[got:nbytes])

    return move


def transport_move(puller: Transport, arena: Arena, peer: Address) -> Move:
    """Lease and pull."""

    async def move(nbytes: int) -> None:
        await puller.fetch(peer, str(nbytes), [arena.region(0, nbytes)], HOLD_S)

    return move


def loopback_move(target: Buffer) -> Move:
    """Pull between two nodes of this process."""
    network = LoopbackNetwork()
    origin = np.arange(LARGEST // 8, dtype=np.int64)
    source, puller = LoopbackTransport("source", network), LoopbackTransport("puller", network)
    publish_all(source, memory_of(origin))
    return transport_move(puller, puller.register(memory_of(target)), source.address)
