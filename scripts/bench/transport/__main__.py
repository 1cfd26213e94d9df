"""Measure the transport's speed beside the raw paths it is made of, and what it costs while idle.

    python -m scripts.bench.transport --out results/transport.jsonl

A source process holds the bytes. In every round each path moves each size once: memcpy, process_vm_readv, a
plain and a TLS socket, and the transports, each judged by the raw path of its kind. The order is drawn anew
each time, since what the last path left in the cache helps the next. Rows are appended as JSONL; the last
thing printed are the tables.
"""

import argparse
import asyncio
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from scripts.arguments import count, one_line
from scripts.bench.transport.paths import (
    HOST,
    KIB,
    LARGEST,
    MIB,
    SIZES,
    Buffer,
    Move,
    SourceAddresses,
    loopback_move,
    memcpy_move,
    memory_of,
    open_node,
    readv_move,
    socket_move,
    source_process,
    tls_context,
    transport_move,
)
from scripts.certificates import make_certificates
from scripts.results import Row, append_rows
from transport.base import Address
from transport.network import NetworkTransport

IDLE_S = 10.0
RAW_OF = {
    "loopback": "memcpy",
    "ucx": "process_vm_readv",
    "plain stream": "socket",
    "TLS stream": "TLS socket",
}
NETWORK_KINDS = tuple(kind for kind in RAW_OF if kind != "loopback")
ALSO_BESIDE = {"TLS stream": "socket"}  # what TLS costs is no fault of the stream, but it is a cost


def open_moves(
    target: Buffer, source: SourceAddresses, pullers: dict[str, NetworkTransport], files: Sequence[str]
) -> dict[str, Move]:
    """Open every path from the source into `target`."""
    moves: dict[str, Move] = {
        "memcpy": memcpy_move(target),
        "loopback": loopback_move(target),
        "process_vm_readv": readv_move(target, source),
        "socket": socket_move(target, source.raw, None),
        "TLS socket": socket_move(target, source.raw_tls, tls_context(files, server=False)),
    }
    for kind, puller in pullers.items():
        peer = Address(HOST, source.transports[kind])
        moves[kind] = transport_move(puller, puller.register(memory_of(target)), peer)
    return moves


async def timed(path: str, move: Move, nbytes: int, target: Buffer, check: bool) -> float:
    """Move the bytes and return the seconds; with `check`, see that they are right."""
    target[:8] = -1
    start_s = time.perf_counter()
    await move(nbytes)
    took_s = time.perf_counter() - start_s
    if check and not np.array_equal(target[: nbytes // 8], np.arange(nbytes // 8)):
        raise AssertionError(f"{path} moved {nbytes} bytes wrongly")
    return took_s


async def race(rounds: int, files: Sequence[str]) -> list[Row]:
    """Time every path and every size, round after round; the first round warms up and is checked."""
    target, rows, chance = np.ones(LARGEST // 8, np.int64), list[Row](), random.Random(0)
    with source_process(NETWORK_KINDS, files) as (source, _):
        pullers = {kind: open_node("puller", kind, files) for kind in NETWORK_KINDS}
        moves = open_moves(target, source, pullers, files)
        for number in range(-1, rounds):
            for nbytes in SIZES:
                for path, move in chance.sample(list(moves.items()), len(moves)):
                    took_s = await timed(path, move, nbytes, target, check=number < 0)
                    rows.append(
                        {"what": "move", "path": path, "nbytes": nbytes, "round": number, "s": took_s}
                    )
        for puller in pullers.values():
            await puller.close()
    return [row for row in rows if row["round"] >= 0]


async def idle(kind: str, files: Sequence[str]) -> Row:
    """Measure the processor time of both ends of one connected pair of nodes that has nothing to do."""
    target = np.ones(LARGEST // 8, np.int64)
    with source_process([kind], files) as (source, control):
        puller = open_node("puller", kind, files)
        move = transport_move(
            puller, puller.register(memory_of(target)), Address(HOST, source.transports[kind])
        )
        await move(MIB)
        control.send("cpu")
        source_s, puller_s, start_s = control.recv(), time.process_time(), time.perf_counter()
        await asyncio.sleep(IDLE_S)
        puller_s = time.process_time() - puller_s
        control.send("cpu")
        source_s, waited_s = control.recv() - source_s, time.perf_counter() - start_s
        await puller.close()
    return {
        "what": "idle",
        "path": kind,
        "source_share": source_s / waited_s,
        "puller_share": puller_s / waited_s,
    }


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Write medians by path and size, and a transport's share of the raw path's speed, or of two."""
    times: dict[tuple[str, int], list[float]] = defaultdict(list)
    for row in rows:
        times[row["path"], row["nbytes"]].append(row["s"])
    middle = {key: statistics.median(seconds) for key, seconds in times.items()}
    yield "| path | " + " | ".join(_size(nbytes) for nbytes in SIZES) + " |"
    yield "|---" * (len(SIZES) + 1) + "|"
    for path in [name for pair in RAW_OF.items() for name in reversed(pair)]:
        cells: list[str] = []
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
    parser.add_argument("--rounds", type=count, default=9)
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        files = make_certificates(Path(folder), [HOST])
        rows = asyncio.run(race(arguments.rounds, files))
        append_rows(arguments.out, rows)
        print(*table(rows), sep="\n")
        for kind in NETWORK_KINDS:
            row = asyncio.run(idle(kind, files))
            append_rows(arguments.out, [row])
            print(
                f"idle {kind}: source {row['source_share']:.2%}, puller {row['puller_share']:.2%} of a core"
            )


if __name__ == "__main__":
    with one_line("scripts.bench.transport"):
        main()
