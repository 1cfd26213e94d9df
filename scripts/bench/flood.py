"""Flood a cluster of the embedded model: python -m scripts.bench.flood [--nodes N] [--seconds S] [--output FILE].

First clients that wait for their answers find what the nodes carry. Then requests come at some times that rate whether
or not they are answered, and at last at half of it. Each row tells what was answered, refused, and in time.
"""

import argparse
import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import quantiles

import aiohttp

from scripts.arguments import count, one_line, positive
from scripts.bench.live_cluster import NotServed, TimedStream, asked, live_cluster, timed_stream
from scripts.results import Row, append_rows

_MODELS = ("demo", "reverse", "upper", "rot13", "sort")
_CLIENTS_A_NODE = 8  # that find the rate which is carried
_SLO_TBT_S = 0.25  # loose: machines that hold a whole cluster are slow
_RECOVERED = 0.5  # of the rate that is carried, after the flood


def summary(streams: Sequence[TimedStream], slo_ttft_s: float, took_s: float) -> Mapping[str, float]:
    """Summarise what came of requests: those accepted, those refused, and the first tokens' times."""
    served = [each for each in streams if each.piece_times_s]
    times = [each.ttft_s for each in served]
    p95 = quantiles(times, n=20, method="inclusive")[-1] if len(times) > 1 else sum(times)
    return {
        "requests": len(streams),
        "accepted": len(served),
        "refused": sum(each.status == 429 for each in streams),
        "failed": sum(each.status not in (200, 429) for each in streams),
        "accepted_per_s": len(served) / took_s,
        "ttft_p95_s": p95,
        "in_time_of_all": sum(each <= slo_ttft_s for each in times) / max(1, len(streams)),
    }


class _Load:
    """Requests to one router, for one adapter after another."""

    def __init__(self, session: aiohttp.ClientSession, address: str, tokens: int) -> None:
        self._session, self._address, self._tokens = session, address, tokens
        self._sent = 0

    async def one(self) -> TimedStream:
        """Send one request."""
        body = asked(_MODELS[self._sent % len(_MODELS)], self._tokens)
        self._sent += 1
        return await timed_stream(self._session, self._address, body)

    async def closed(self, clients: int, seconds: float) -> list[TimedStream]:
        """Have clients that each wait for an answer before the next request."""
        end_s, streams = time.perf_counter() + seconds, list[TimedStream]()

        async def client() -> None:
            while time.perf_counter() < end_s:
                streams.append(await self.one())

        await asyncio.gather(*(client() for _ in range(clients)))
        return streams

    async def open(self, per_s: float, seconds: float) -> list[TimedStream]:
        """Send so many requests a second, evenly."""
        began_s, tasks = time.perf_counter(), list[asyncio.Task[TimedStream]]()
        for at in range(max(1, int(per_s * seconds))):
            await asyncio.sleep(max(0.0, began_s + at / per_s - time.perf_counter()))
            tasks.append(asyncio.create_task(self.one()))
        return list(await asyncio.gather(*tasks))


async def measure(args: argparse.Namespace) -> list[Row]:
    """Find what is carried, flood, and look at the recovery."""
    started, slo_s = time.strftime("%Y-%m-%dT%H:%M:%S"), args.slo_ttft_s
    same = {"started": started, "nodes": args.nodes, "tokens": args.tokens, "slo_ttft_s": slo_s}
    options = ("--slo-ttft-s", str(slo_s), "--slo-tbt-s", str(_SLO_TBT_S))
    connector = aiohttp.TCPConnector(limit=0)
    async with (
        live_cluster(args.nodes, options, args.start_s) as processes,
        aiohttp.ClientSession(connector=connector) as session,
    ):
        load = _Load(session, processes.address("router-0"), args.tokens)
        await load.closed(args.nodes, min(5.0, args.seconds))  # warms up, and teaches nodes their costs
        carried = await load.closed(_CLIENTS_A_NODE * args.nodes, args.seconds)
        rows: list[Row] = [{**same, "phase": "carried", **summary(carried, slo_s, args.seconds)}]
        rate = rows[0]["accepted_per_s"]
        if not rate:
            raise NotServed("no request was answered at all: give a longer --slo-ttft-s")
        for phase, per_s in (("flood", args.times * rate), ("after", _RECOVERED * rate)):
            streams = await load.open(per_s, args.seconds)
            found = summary(streams, slo_s, args.seconds)
            rows.append({**same, "phase": phase, "offered_per_s": per_s, **found})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure once, and print the rows; `--output` adds them to a file of rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=count, default=4)
    parser.add_argument("--times", type=positive, default=4.0, help="what is carried, in the flood")
    parser.add_argument("--seconds", type=positive, default=20.0, help="of each phase")
    parser.add_argument("--tokens", type=count, default=192, help="of each answer")
    parser.add_argument("--slo-ttft-s", type=positive, default=2.0)
    parser.add_argument("--start-s", type=positive, default=180.0, help="give up if the cluster takes longer")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(arguments)
    with one_line("scripts.bench.flood"):
        rows = asyncio.run(measure(args))
    for row in rows:
        print(json.dumps(row))
    if args.output is not None:
        append_rows(args.output, rows)


if __name__ == "__main__":
    main()
