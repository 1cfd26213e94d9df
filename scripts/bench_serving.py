"""The load run: many clients, popular and unpopular adapters, good and bad manners; then a look for leaks.

    python scripts/bench_serving.py                                   # starts a server of the embedded model
    python scripts/bench_serving.py --url http://127.0.0.1:8000 --rate 20 --requests 500
    python scripts/bench_serving.py --trace trace.csv --time-scale 0.2

Prints a line per adapter (times to first token and between tokens, tokens/s), what became of every request,
and what the server still holds when all clients are gone. Exits with 1 if a sound request failed, a malformed
one was not refused, or a block or sequence leaked.
"""

import argparse
import asyncio
import itertools
import json
import math
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import aiohttp

from engine.demo.embedded import TASKS
from scripts.bench import machine, report, traffic
from scripts.bench.client import Load, Outcome, Verdict
from scripts.bench.question import Inquirer, Question, ask_badly, ask_task, ask_tokens
from scripts.bench.server import Models, Probe, ServerFailed, started
from scripts.bench.traffic import Arrival, Fault

ROOT = Path(__file__).resolve().parents[1]
READY_S = 300.0
REST_S = 30.0


@dataclass(frozen=True, slots=True)
class Mix:
    """What is asked of a server: everything about the load but the clients."""

    models: Models
    inquire: Inquirer
    rng: Random

    def question(self, arrival: Arrival) -> Question:
        """A sound question, or a malformed one if the arrival says so."""
        if arrival.fault in (None, Fault.LEAVES):
            return self.inquire(arrival, self.rng)
        return ask_badly(arrival, self.models.max_model_len, self.rng)


def choose_inquirer(options: argparse.Namespace, models: Models) -> Inquirer:
    """Tasks with known answers where every adapter is one of the embedded ones, unless lengths are given."""
    tasks = {task.name for task in TASKS}
    knows_tasks = bool(models.adapters) and tasks.issuperset(models.adapters)
    if options.questions == "tasks" and not knows_tasks:
        raise ServerFailed("--questions tasks: the server's adapters are not the embedded ones; use tokens")
    plain = options.questions == "tokens" or options.trace is not None
    return ask_tokens if plain or not knows_tasks else ask_task


def draw_arrivals(options: argparse.Namespace, models: Models, rng: Random) -> Iterator[Arrival]:
    """The load's requests, at most `--requests`."""
    popularity = traffic.zipf(models.base, models.adapters, options.zipf_s, options.base_share, rng)
    if options.trace:
        calls = iter(traffic.fit(traffic.read_trace(options.trace, options.time_scale), models.max_model_len))
    else:
        calls = traffic.poisson(options.rate, options.prompt_tokens, options.output_tokens, rng)
    faulty = traffic.arrivals(calls, popularity, options.fault_share, rng)
    return itertools.islice(faulty, options.requests)


@asynccontextmanager
async def server(options: argparse.Namespace) -> AsyncIterator[str]:
    """The URL to load: the given one, or that of a server that lives as long as the load."""
    if options.url:
        yield options.url.rstrip("/")
        return
    async with started(options.serve, ROOT, READY_S) as url:
        yield url


async def bombard(options: argparse.Namespace, rest_s: float = REST_S) -> bool:
    """The whole run; whether all was well. The server may take `rest_s` to let go of what it holds."""
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=options.timeout)
    async with (
        server(options) as url,
        aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session,
    ):
        probe, rng = Probe(session, url), Random(options.seed)
        models = await probe.models()
        mix = Mix(models, choose_inquirer(options, models), rng)
        load = Load(session, url, mix.question, rng)
        start_s = time.perf_counter()
        outcomes = await load.run(draw_arrivals(options, models, rng), options.clients, options.duration)
        wall_s = time.perf_counter() - start_s
        held = await probe.rest(rest_s)
    write(options, report.rows(outcomes, models.ranks, wall_s), wall_s)
    if not math.isinf(options.rate) or options.trace:
        print(f"\nthe longest wait for a free client: {max_late_s(outcomes):.2f} s")
    return conclude(outcomes, held, wall_s)


def max_late_s(outcomes: Sequence[Outcome]) -> float:
    """How long a due request waited at most, since all clients were busy; what it waited is not in its times."""
    return max((outcome.late_s for outcome in outcomes), default=0.0)


def write(options: argparse.Namespace, rows: Sequence[dict[str, object]], wall_s: float) -> None:
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
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("a") as sink:
        for row in rows:
            known = {
                name: value for name, value in row.items() if value == value
            }  # less NaN, which JSON lacks
            print(json.dumps(known | about), file=sink)


def conclude(outcomes: Sequence[Outcome], held: dict[str, float], wall_s: float) -> bool:
    """Say in words what happened; whether it is what should have."""
    count = {verdict: sum(outcome.verdict is verdict for outcome in outcomes) for verdict in Verdict}
    print(f"\n{len(outcomes)} requests in {wall_s:.1f} s")
    print(f"killed clients {count[Verdict.LEFT]}; malformed requests refused {count[Verdict.REFUSED]}")
    answered = count[Verdict.OK] + count[Verdict.WRONG]
    print(f"answers as they should be: {count[Verdict.OK]} of {answered}")
    for line in report.grievances(outcomes):
        print(f"FAILED {line}")
    print("leaked: " + (", ".join(f"{name} = {value:.0f}" for name, value in held.items()) or "nothing"))
    return bool(outcomes) and not held and not count[Verdict.FAILED]


def span(text: str) -> tuple[int, int]:
    """`LOW-HIGH`, or one number for both."""
    low, _, high = text.partition("-")
    return int(low), int(high or low)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. What follows `--` goes to the server that is started."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--url", help="a running server; without it one is started")
    add("--api-key")
    add("--clients", type=int, default=64, help="requests in flight at most")
    add(
        "--rate",
        type=float,
        default=math.inf,
        help="arrivals per second, Poisson; inf: as fast as clients can",
    )
    add("--requests", type=int, default=1000, help="requests at most")
    add("--duration", type=float, default=120.0, help="seconds after which none is sent")
    add("--timeout", type=float, default=120.0, help="seconds that a request may take")
    add("--zipf-s", type=float, default=1.0, help="skew of the adapters' popularity; 0: all alike")
    add("--base-share", type=float, default=0.1, help="share of requests for the base")
    add("--fault-share", type=float, default=0.1, help="share of killed clients and malformed requests")
    add("--questions", choices=("auto", "tasks", "tokens"), default="auto")
    add("--prompt-tokens", type=span, default=(16, 128), help="LOW-HIGH")
    add("--output-tokens", type=span, default=(8, 64), help="LOW-HIGH")
    add(
        "--trace",
        type=Path,
        help="CSV of TIMESTAMP, ContextTokens, GeneratedTokens; replaces rate and lengths",
    )
    add("--time-scale", type=float, default=1.0, help="stretch of the trace's gaps: 0.1 is ten times as fast")
    add("--seed", type=int, default=0)
    add("--out", type=Path, help="JSONL file to append rows to")
    add("serve", nargs="*", help="options of the server that is started, after --")
    return parser.parse_args(arguments)


def main() -> int:
    """0 if all was well."""
    try:
        return 0 if asyncio.run(bombard(parse())) else 1
    except (ServerFailed, aiohttp.ClientError) as error:
        print(f"bench_serving: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
