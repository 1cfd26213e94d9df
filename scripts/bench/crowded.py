"""Load a server that knows many more adapters than its memory holds: its throughput, and first tokens by tier.

    python -m scripts.bench.crowded --out results/crowded.jsonl               # as fast as the clients can: throughput
    python -m scripts.bench.crowded --rate 8 --out results/crowded.jsonl      # at a rate that all runs carry: times

10,000 adapters are registered. 300 of them are hot: they are asked for by a zipf law. Memory holds 40 of the hot ones.
A share of the requests is for adapters that nobody has asked for yet. Three servers are started one after another and
get the same requests: memory of `fits` holds all hot adapters; `host` and `disk` keep what was evicted there. Each hot
adapter is asked for once before anything is measured.

Which tier has an adapter is asked of the server just before each request. `source` is a folder that must be read
again, since neither memory nor disk kept what was packed; `folder` is one that was never read. Answers are checked.
It prints a line for each run and tier, and appends them to `--out`. It exits with 1 if a request failed, if an answer
was wrong, or if a server kept something.
"""

import argparse
import asyncio
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
import numpy as np
from safetensors.torch import load

from scripts.arguments import count, not_negative, one_line, rate, share
from scripts.bench import machine
from scripts.bench.serving import report, traffic
from scripts.bench.serving.client import LoadGenerator, RequestEnd, RequestOutcome
from scripts.bench.serving.http_request import task_request
from scripts.bench.serving.server import ServerFailed, ServerProbe, started
from scripts.bench.serving.tenants import task_name, write_tenants
from scripts.bench.serving.traffic import PlannedRequest
from scripts.results import Row, append_rows

ROOT = Path(__file__).resolve().parents[2]
READY_S, REST_S, REQUEST_S = 300.0, 30.0, 120.0
COUNTS = "counts"
TIERS = ("device", "host", "disk", "source", "folder")
COLUMNS = (
    "run", "tier", "requests", "ok", "mistaken", "turned away", "ttft_p50_ms", "ttft_p95_ms", "tbt_p50_ms",
    "output_tok_s", "percent_of_fits",
)  # fmt: skip
_ROOM = 1.05  # more than the adapters' bytes, since each begins on a page of its own


@dataclass(frozen=True, slots=True)
class Crowd:
    """The adapters of a server: those that are hot, and those that are asked for once.

    `nbytes` is what the hot ones take in float32, `largest` what the largest of all takes.
    """

    folder: Path
    hot: tuple[str, ...]
    cold: tuple[str, ...]
    nbytes: int
    largest: int


def write_crowd(folder: Path, registered: int, hot: int, cold: int, rng: Random) -> Crowd:
    """Write the folders of all registered adapters. Those that nobody asks for share their files with others."""
    names = write_tenants(folder, hot + cold, rng)
    for number in range(len(names), registered):
        shared = folder / names[number % len(names)]
        own = folder / f"{task_name(shared.name)}-{number:04d}"
        own.mkdir()
        for file in shared.iterdir():
            os.link(file, own / file.name)
    sizes = [_nbytes(folder / name / "adapter_model.safetensors") for name in names]
    return Crowd(folder, names[:hot], names[hot:], sum(sizes[:hot]), max(sizes))


def _nbytes(weights: Path) -> int:
    """Count the bytes of an adapter's numbers in float32."""
    return sum(4 * tensor.numel() for tensor in load(weights.read_bytes()).values())


def plan(options: argparse.Namespace, crowd: Crowd) -> list[PlannedRequest]:
    """Draw the requests: hot adapters by popularity, and each cold one once, somewhere among them."""
    rng = np.random.default_rng(options.seed)
    number: int = options.requests
    if math.isinf(options.rate):
        calls = traffic.at_once(number, (1, 1), (1, 1), rng)
    else:
        calls = traffic.at_rate(options.rate, 2 * number / options.rate, (1, 1), (1, 1), rng)[:number]
    popularity = traffic.zipf("", crowd.hot, options.zipf_s, 0.0, rng)
    planned = list(traffic.plan_requests(calls, popularity, 0.0, rng))
    places: list[int] = rng.permutation(len(planned)).tolist()
    for place, name in zip(places, crowd.cold, strict=False):
        planned[place] = replace(planned[place], model=name)
    return planned


def runs(crowd: Crowd, memory_for: int, cache: Path) -> dict[str, list[str]]:
    """List the servers' options by run, the one that has memory for all hot adapters first."""
    all_hot = _ROOM * crowd.nbytes
    least = max(_ROOM * crowd.largest, all_hot * memory_for / len(crowd.hot))
    few = ["--adapter-bytes", str(round(least))]
    # A cold adapter comes beside the hot ones: it must displace none of them.
    roomy = ["--adapter-bytes", str(round(all_hot * (1 + len(crowd.cold) / len(crowd.hot))))]
    return {"fits": roomy, "host": few, "disk": [*few, "--adapter-cache-dir", str(cache)]}


async def measure(
    options: argparse.Namespace, crowd: Crowd, run: str, arguments: Sequence[str]
) -> tuple[list[Row], bool]:
    """Start a server, ask for each hot adapter once, send the load; return rows, and whether all was well."""
    rng, planned = Random(options.seed), plan(options, crowd)
    about = ["--lora-dir", str(crowd.folder), "--lora-root", str(crowd.folder), "--lora-dtype", "float32"]
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=REQUEST_S)
    async with (
        started([*about, *arguments, *options.serve], ROOT, READY_S) as url,
        aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
    ):
        probe = ServerProbe(session, url)
        load = LoadGenerator(session, url, lambda one: task_request(one, rng), rng, probe.tier)
        first = (PlannedRequest(0.0, name, 1, 1) for name in rng.sample(crowd.hot, len(crowd.hot)))
        warm = await load.ask_again(await load.run(first, options.clients, math.inf))
        before, start_s = await probe.metrics(), time.perf_counter()
        outcomes = await load.run(iter(planned), options.clients, math.inf)
        wall_s = time.perf_counter() - start_s
        after = await probe.metrics()
        outcomes = await load.ask_again(outcomes)
        held = await probe.rest(REST_S)
    sound = not held and not failures([*warm, *outcomes])
    return [*rows(run, outcomes, wall_s), counts(run, before, after)], sound


def failures(outcomes: Iterable[RequestOutcome]) -> list[RequestOutcome]:
    """Select and print what should not have been."""
    found = [each for each in outcomes if each.end in (RequestEnd.FAILED, RequestEnd.WRONG)]
    for each in found[:5]:
        print(f"{each.end.name} {each.planned.model}: {each.detail}")
    return found


def rows(run: str, outcomes: Sequence[RequestOutcome], wall_s: float) -> list[Row]:
    """Compute the figures of a run, of each tier that an adapter was found in and of all."""
    found: list[Row] = []
    for tier in (*TIERS, report.ALL):
        mine = [each for each in outcomes if tier in (each.tier, report.ALL)]
        if mine:
            figures = report.row(tier, None, mine, wall_s)
            found.append({"run": run, "tier": tier} | figures | {"requests_s": len(mine) / wall_s})
    return found


def counts(run: str, before: Mapping[str, float], after: Mapping[str, float]) -> Row:
    """Say how often the server loaded what it knew, by tier, and evicted, while it was measured."""
    row: dict[str, Any] = {"run": run, "tier": COUNTS}
    for tier in ("host", "disk", "source"):
        name = f'loraserve_adapter_hits_total{{tier="{tier}"}}'
        row[f"loads_{tier}"] = after.get(name, 0.0) - before.get(name, 0.0)
    evictions = "loraserve_adapter_evictions_total"
    return row | {"evictions": after[evictions] - before[evictions]}


def table(found: Sequence[Row]) -> str:
    """Write the figures, throughput also as a share of that of the run whose memory holds all."""
    figures = [row for row in found if row["tier"] != COUNTS]
    whole = next(row["output_tok_s"] for row in figures if row["tier"] == report.ALL)
    shares: list[Row] = []
    for row in figures:
        percent = 100 * row["output_tok_s"] / whole if row["tier"] == report.ALL else None
        shares.append({**row, "percent_of_fits": percent})
    told = [
        ", ".join(f"{name} {value}" for name, value in row.items()) for row in found if row["tier"] == COUNTS
    ]
    return "\n".join([report.table(shares, COLUMNS), *told])


async def run_all(options: argparse.Namespace) -> bool:
    """Measure every run; whether all was well."""
    about = {
        name: getattr(options, name)
        for name in ("registered", "hot", "memory_for", "clients", "zipf_s", "seed")
    }
    about |= {"rate": None if math.isinf(options.rate) else options.rate, "machine": machine.describe()}
    about["started"] = time.strftime("%Y-%m-%dT%H:%M:%S")
    found, sound = list[Row](), True
    with TemporaryDirectory(prefix="loraserve-crowd-", dir=options.folder) as folder:
        rng, cold = Random(options.seed), round(options.requests * options.cold_share)
        adapters = Path(folder, "adapters")
        crowd = await asyncio.to_thread(write_crowd, adapters, options.registered, options.hot, cold, rng)
        print(
            f"{len(crowd.hot)} hot adapters of {crowd.nbytes / 1e6:.0f} MB, memory for {options.memory_for}"
        )
        for run, arguments in runs(crowd, options.memory_for, Path(folder, "cache")).items():
            measured, well = await measure(options, crowd, run, arguments)
            found += measured
            sound = sound and well
            if options.out is not None:
                known = ({name: value for name, value in row.items() if value == value} for row in measured)
                append_rows(options.out, [row | about for row in known])
    print(table(found))
    return sound


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line. What follows `--` goes to the servers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--registered", type=count, default=10_000, help="adapters that the servers know")
    add("--hot", type=count, default=300, help="of these, those that are asked for again and again")
    add("--memory-for", type=count, default=40, help="hot adapters that memory holds, on average")
    add("--requests", type=count, default=2000)
    add("--cold-share", type=share, default=0.02, help="share of requests for adapters not asked for before")
    add("--clients", type=count, default=16, help="requests in flight at most")
    add(
        "--rate",
        type=rate,
        default=math.inf,
        help="arrivals per second, Poisson; inf: as fast as clients can",
    )
    add("--zipf-s", type=not_negative, default=1.0, help="skew of the hot adapters' popularity; 0: all alike")
    add("--seed", type=int, default=0)
    add("--folder", type=Path, help="where adapters are written; by default where temporary files are")
    add("--out", type=Path, help="JSONL file to append rows to")
    add("serve", nargs="*", help="options of the servers, after --")
    options = parser.parse_args(arguments)
    cold = round(options.requests * options.cold_share)
    if options.hot + cold > options.registered:
        parser.error(
            f"--registered {options.registered}: give at least {options.hot + cold}, the hot and the cold ones"
        )
    if options.memory_for > options.hot:
        parser.error(f"--memory-for {options.memory_for}: give at most --hot {options.hot}")
    return options


def main() -> int:
    """Measure; 0 if all was well."""
    try:
        return 0 if asyncio.run(run_all(parse())) else 1
    except (ServerFailed, aiohttp.ClientError) as error:
        print(f"scripts.bench.crowded: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    with one_line("scripts.bench.crowded"):
        sys.exit(main())
