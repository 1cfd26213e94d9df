"""Load a server: many clients, popular and unpopular adapters, good and bad clients; then look for leaks.

    python -m scripts.bench.serving                                   # starts a server of the embedded model
    python -m scripts.bench.serving --url http://127.0.0.1:8000 --rate 20 --requests 500
    python -m scripts.bench.serving --trace trace.csv --time-scale 0.2
    python -m scripts.bench.serving --tenants 300 --churn 2 --rate 20 -- --adapter-bytes 15MB

It prints a line per adapter (times to first token and between tokens, tokens/s) and what became of every
request. Then it prints what the server still holds when all clients are gone. It exits with 1 if a sound
request failed or a malformed one was not refused. It does so too if an answer was not the one that its model
gives alone, or if a block or sequence leaked.
"""

import argparse
import asyncio
import math
import sys
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import aiohttp
import numpy as np

from engine.demo.embedded import TASKS
from scheduler.sim.workload.trace import InvalidTrace, read_trace
from scripts.arguments import count, not_negative, one_line, positive, rate, seconds, share, span
from scripts.bench import machine
from scripts.bench.serving import report, traffic
from scripts.bench.serving.client import LoadGenerator, RequestEnd, RequestOutcome
from scripts.bench.serving.http_request import (
    HttpRequest,
    RequestMaker,
    malformed_request,
    task_request,
    token_request,
)
from scripts.bench.serving.server import (
    ListedModels,
    ServerFailed,
    ServerProbe,
    event_loop_stalls,
    started,
)
from scripts.bench.serving.tenants import TenantChurn, task_name, write_tenants
from scripts.bench.serving.traffic import ClientFault, PlannedRequest
from scripts.results import Row, append_rows

ROOT = Path(__file__).resolve().parents[3]
READY_S = 300.0
REST_S = 30.0
TENANTS = "tenants"


@dataclass(frozen=True, slots=True)
class LoadMix:
    """What is asked of a server: everything about the load but the clients."""

    models: ListedModels
    make: RequestMaker
    rng: Random

    def request(self, planned: PlannedRequest) -> HttpRequest:
        """Make a sound request, or a malformed one if it is planned so."""
        if planned.fault in (None, ClientFault.LEAVES):
            return self.make(planned, self.rng)
        return malformed_request(planned, self.models.max_model_len, self.rng)


def choose_maker(options: argparse.Namespace, models: ListedModels) -> RequestMaker:
    """Choose tasks with known answers where every adapter is an embedded one, unless lengths are given."""
    tasks = {task.name for task in TASKS}
    knows_tasks = bool(models.adapters) and tasks.issuperset(map(task_name, models.adapters))
    if options.questions == "tasks" and not knows_tasks:
        raise ServerFailed("--questions tasks: the server's adapters are not the embedded ones; use tokens")
    plain = options.questions == "tokens" or options.trace is not None
    return token_request if plain or not knows_tasks else task_request


def draw_requests(options: argparse.Namespace, models: ListedModels) -> Iterator[PlannedRequest]:
    """Draw the load's requests, at most `--requests`. Raises InvalidTrace."""
    rng = np.random.default_rng(options.seed)
    popularity = traffic.zipf(models.base, models.adapters, options.zipf_s, options.base_share, rng)
    lengths = options.prompt_tokens, options.output_tokens
    if options.trace:
        calls = [
            call.at(call.arrival_s * options.time_scale) for call in read_trace(options.trace.read_text())
        ]
        calls = traffic.fit(calls, models.max_model_len)
    elif math.isinf(options.rate):
        calls = traffic.at_once(options.requests, *lengths, rng)
    else:
        calls = traffic.at_rate(options.rate, max(0.0, options.duration), *lengths, rng)
    return traffic.plan_requests(calls[: options.requests], popularity, options.fault_share, rng)


@asynccontextmanager
async def server(options: argparse.Namespace, folder: Path) -> AsyncGenerator[str, None]:
    """Give the URL to load: the given one, or that of a server that lives as long as the load.

    The server that is started knows the tenants that are written below `folder`.
    """
    if options.url:
        yield options.url.rstrip("/")
        return
    tenants: list[str] = []
    if options.tenants:
        await asyncio.to_thread(write_tenants, folder / TENANTS, options.tenants, Random(options.seed))
        tenants = ["--lora-dir", str(folder / TENANTS), "--lora-root", str(folder)]
    async with started([*tenants, *options.serve], ROOT, READY_S) as url:
        yield url


@asynccontextmanager
async def churn(
    options: argparse.Namespace, session: aiohttp.ClientSession, url: str, folder: Path
) -> AsyncGenerator[TenantChurn, None]:
    """Change the tenants as long as the block lasts, if that is asked for. Raises ServerFailed."""
    tenants = TenantChurn(session, url, folder / "changed", Random(options.seed))
    if not options.churn:
        yield tenants
        return
    names = [path.name for path in sorted((folder / TENANTS).iterdir())]
    changes = asyncio.create_task(tenants.run(names, options.churn))
    try:
        yield tenants
    finally:
        changes.cancel()
        with suppress(asyncio.CancelledError):
            await changes


async def run_load(options: argparse.Namespace, rest_s: float = REST_S) -> bool:
    """Run the load; whether all was well. The server may take `rest_s` to release what it holds."""
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=options.timeout)
    with TemporaryDirectory(prefix="loraserve-load-") as folder:
        async with (
            server(options, Path(folder)) as url,
            aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session,
        ):
            probe = ServerProbe(session, url)
            models = await probe.models()
            mix = LoadMix(models, choose_maker(options, models), Random(options.seed))
            load = LoadGenerator(session, url, mix.request, mix.rng)
            start_s = time.perf_counter()
            async with churn(options, session, url, Path(folder)) as changes:
                outcomes = await load.run(draw_requests(options, models), options.clients, options.duration)
            wall_s = time.perf_counter() - start_s
            held = await probe.rest(rest_s)
            outcomes = await load.ask_again(outcomes)
            stalls = event_loop_stalls(await probe.metrics())
    write(options, report.rows(outcomes, models.ranks, wall_s), wall_s)
    if not math.isinf(options.rate) or options.trace:
        print(f"\nthe longest wait for a free client: {max_late_s(outcomes):.2f} s")
    if options.tenants:
        print(
            f"\ntenants {options.tenants}; reloaded {changes.reloads}, spares loaded and unloaded {changes.spares}"
        )
    return conclude(outcomes, held, wall_s) and few_stalls(stalls, options.most_stalls)


def few_stalls(stalls: float | None, most: int | None) -> bool:
    """Print how often the server's event loop came late; whether that is no more than `most`, if one is given."""
    print(f"event loop stalls: {'not told' if stalls is None else f'{stalls:.0f}'}")
    return most is None or (stalls is not None and stalls <= most)


def max_late_s(outcomes: Sequence[RequestOutcome]) -> float:
    """Compute how long a due request waited at most for a free client; its times leave that out."""
    return max((outcome.late_s for outcome in outcomes), default=0.0)


def write(options: argparse.Namespace, rows: Sequence[Row], wall_s: float) -> None:
    """Print the table; append the rows to the results file, if one is wanted."""
    print(report.table(rows))
    if options.out is None:
        return
    about = {
        "clients": options.clients,
        "rate": None if math.isinf(options.rate) else options.rate,
        "trace": options.trace and options.trace.name,
        "time_scale": options.time_scale,
        "zipf_s": options.zipf_s,
        "fault_share": options.fault_share,
        "wall_s": round(wall_s, 3),
        "machine": machine.describe(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }
    # JSON lacks NaN: a figure that is none is left out.
    known = ({name: value for name, value in row.items() if value == value} for row in rows)
    append_rows(options.out, [row | about for row in known])


def conclude(outcomes: Sequence[RequestOutcome], held: dict[str, float], wall_s: float) -> bool:
    """Print what happened; whether it is what should have."""
    count = {end: sum(outcome.end is end for outcome in outcomes) for end in RequestEnd}
    print(f"\n{len(outcomes)} requests in {wall_s:.1f} s")
    print(f"killed clients {count[RequestEnd.LEFT]}; malformed requests refused {count[RequestEnd.REFUSED]}")
    answered = count[RequestEnd.OK] + count[RequestEnd.MISTAKEN] + count[RequestEnd.WRONG]
    print(f"answers as they should be: {count[RequestEnd.OK]} of {answered}", end="; ")
    print(f"not right, but the same alone: {count[RequestEnd.MISTAKEN]}")
    for end in (RequestEnd.WRONG, RequestEnd.FAILED):
        for line in report.failures(outcomes, end):
            print(f"{end.name} {line}")
    print("leaked: " + (", ".join(f"{name} = {value:.0f}" for name, value in held.items()) or "nothing"))
    return bool(outcomes) and not (held or count[RequestEnd.FAILED] or count[RequestEnd.WRONG])


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line. What follows `--` goes to the server that is started."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--url", help="a running server; without it one is started")
    add("--api-key")
    add("--clients", type=count, default=64, help="requests in flight at most")
    add(
        "--rate",
        type=rate,
        default=math.inf,
        help="arrivals per second, Poisson; inf: as fast as clients can",
    )
    add("--requests", type=count, default=1000, help="requests at most")
    add("--duration", type=seconds, default=120.0, help="seconds after which none is sent")
    add("--timeout", type=seconds, default=120.0, help="seconds that a request may take")
    add("--zipf-s", type=not_negative, default=1.0, help="skew of the adapters' popularity; 0: all alike")
    add("--base-share", type=share, default=0.1, help="share of requests for the base")
    add("--fault-share", type=share, default=0.1, help="share of killed clients and malformed requests")
    add("--questions", choices=("auto", "tasks", "tokens"), default="auto")
    add("--prompt-tokens", type=span, default=(16, 128), help="LOW-HIGH")
    add("--output-tokens", type=span, default=(8, 64), help="LOW-HIGH")
    add(
        "--trace",
        type=Path,
        help="CSV of TIMESTAMP, ContextTokens, GeneratedTokens; replaces rate and lengths",
    )
    add(
        "--time-scale",
        type=positive,
        default=1.0,
        help="stretch of the trace's gaps: 0.1 is ten times as fast",
    )
    add("--seed", type=int, default=0)
    add("--tenants", type=int, default=0, help="adapters with known answers that the started server gets")
    add("--churn", type=seconds, default=0.0, help="seconds between changes of the tenants; 0: none")
    add(
        "--most-stalls",
        type=int,
        help="fail if the server's event loop was over 20 ms late more often than this",
    )
    add("--out", type=Path, help="JSONL file to append rows to")
    add("serve", nargs="*", help="options of the server that is started, after --")
    return parser.parse_args(arguments)


def main() -> int:
    """Run the load; 0 if all was well."""
    try:
        return 0 if asyncio.run(run_load(parse())) else 1
    except (ServerFailed, InvalidTrace, aiohttp.ClientError) as error:
        print(f"scripts.bench.serving: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    with one_line("scripts.bench.serving"):
        sys.exit(main())
