"""Measure what a router adds to each token: python -m scripts.bench.hop [--pairs N] [--tokens N] [--output FILE].

A router and one node of the embedded model run on this machine. The same request goes to the router and to the node
itself, in turns. The row tells the medians of the pairs' differences, and the router's processor time for each token.
"""

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles

import aiohttp

from scripts.arguments import count, one_line, positive
from scripts.bench.live_cluster import NotServed, TimedStream, asked, cpu_s, live_cluster, timed_stream
from scripts.results import Row, append_rows

_MS = 1000.0
_WARM_UP = 4  # requests to each side that do not count


async def _served(session: aiohttp.ClientSession, address: str, tokens: int) -> TimedStream:
    stream = await timed_stream(session, address, asked("reverse", tokens))
    if len(stream.piece_times_s) < 2:
        raise NotServed(f"{address} answered with {stream.status} and {len(stream.piece_times_s)} pieces")
    return stream


def summary(pairs: Sequence[tuple[TimedStream, TimedStream]]) -> Row:
    """Summarise pairs of a stream by the router and one by the node, in milliseconds."""
    routed, direct = zip(*pairs, strict=True)
    first = [_MS * (by_router.ttft_s - by_node.ttft_s) for by_router, by_node in pairs]
    later = [_MS * (by_router.gap_s - by_node.gap_s) for by_router, by_node in pairs]
    return {
        "pairs": len(pairs),
        "router_ttft_ms": _MS * median(each.ttft_s for each in routed),
        "node_ttft_ms": _MS * median(each.ttft_s for each in direct),
        "added_ttft_ms": median(first),
        "added_ttft_quartiles_ms": quantiles(first, n=4),
        "router_token_ms": _MS * median(each.gap_s for each in routed),
        "node_token_ms": _MS * median(each.gap_s for each in direct),
        "added_token_ms": median(later),
        "added_token_quartiles_ms": quantiles(later, n=4),
    }


async def measure(pairs: int, tokens: int, start_s: float) -> Row:
    """Measure so many pairs of streams of so many tokens."""
    started = time.strftime("%Y-%m-%dT%H:%M:%S")
    async with (
        live_cluster(1, start_s=start_s) as processes,
        aiohttp.ClientSession() as session,
    ):
        router, node = processes.address("router-0"), processes.address("node-0")
        for address in (router, node) * _WARM_UP:
            await _served(session, address, tokens)
        pid = processes.pid("router-0")
        assert pid is not None, "it has just answered"
        found: list[tuple[TimedStream, TimedStream]] = []
        used_s = 0.0
        for at in range(pairs):
            first, second = (router, node) if at % 2 else (node, router)
            streams: dict[str, TimedStream] = {}
            before_s = cpu_s(pid)
            for address in (first, second):
                streams[address] = await _served(session, address, tokens)
            used_s += cpu_s(pid) - before_s
            found.append((streams[router], streams[node]))
    used_ms = _MS * used_s / (pairs * tokens)
    return {"started": started, "tokens": tokens, **summary(found), "router_cpu_ms_per_token": used_ms}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure once, and print the row; `--output` adds it to a file of rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=count, default=100)
    parser.add_argument("--tokens", type=count, default=64, help="of each answer, 2 at least")
    parser.add_argument("--start-s", type=positive, default=120.0, help="give up if the cluster takes longer")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(arguments)
    with one_line("scripts.bench.hop"):
        if args.pairs < 2 or args.tokens < 2:
            raise ValueError(f"--pairs {args.pairs} --tokens {args.tokens}: give 2 at least of each")
        row = asyncio.run(measure(args.pairs, args.tokens, args.start_s))
    print(json.dumps(row))
    if args.output is not None:
        append_rows(args.output, [row])


if __name__ == "__main__":
    main()
