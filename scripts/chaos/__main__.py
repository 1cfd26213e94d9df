"""Do harm to a live cluster under load, and count what clients see of it.

    python -m scripts.chaos --nodes 4 --routers 2 --seconds 120 --every 4
    python -m scripts.chaos --namespaces --traces FOLDER --seconds 1800 --out results/chaos.jsonl.gz
    python -m scripts.chaos --rolling

It starts the embedded model as a cluster on this machine, in float32, with many adapters of ranks 8 to 128 that do the
embedded tasks. Requests come as in Azure's trace, if FOLDER has it, else at random. Every few seconds a process is
killed, told to end or halted. With --namespaces links are cut, parted and slowed too, which needs root. With --rolling
each member is restarted in turn instead. Every answer is compared with that of one engine alone, and its beginning with
what the task's program says.
"""

import argparse
import asyncio
import json
import signal
import sys
import tempfile
import time
from collections.abc import Sequence, Set
from pathlib import Path
from random import Random

import aiohttp
import numpy as np

from scripts.arguments import count, one_line, positive
from scripts.chaos.adapter_copies import plan_copies, write_copies
from scripts.chaos.cluster_processes import ClusterPlan, ClusterProcesses
from scripts.chaos.faults import FaultInjection
from scripts.chaos.load import ClientLoad
from scripts.chaos.move_counts import MoveCounts
from scripts.chaos.network import Network, NetworkRefused
from scripts.chaos.questions import Answers, Asked, calls, draw_questions
from scripts.chaos.records import Records

_READY_S = 300.0
_TERMINATED = 128 + signal.SIGTERM


async def run(
    options: argparse.Namespace, cluster: ClusterProcesses, asked: Sequence[Asked], answers: Answers
) -> Records:
    """Run a cluster through trouble. Raises ValueError if it never gets ready."""
    rng = Random(options.seed)
    cluster.start()
    try:
        connector = aiohttp.TCPConnector(force_close=True, limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:
            await _wait_ready(session, cluster, {each.adapter.name for each in asked})
            began_s = time.monotonic()
            faults = FaultInjection(cluster, session, began_s, rng)
            routers = {name: cluster.address(name) for name in cluster.routers}
            load = ClientLoad(session, routers, answers, faults.is_troubled, rng)
            moves = MoveCounts(session, routers)
            watching = asyncio.create_task(moves.watch())
            until_s = began_s + options.seconds
            harm = faults.roll(until_s) if options.rolling else faults.strike(options.every, until_s)
            try:
                await asyncio.gather(harm, load.play(asked, began_s))
            finally:
                watching.cancel()
            await moves.look()
            load.records.faults, load.records.moved = faults.records, moves.total
            for why, times in load.retries.most_common(12):
                sys.stderr.write(f"asked again {times} times: {why}\n")
            return load.records
    finally:
        await cluster.stop()


async def _wait_ready(session: aiohttp.ClientSession, cluster: ClusterProcesses, names: Set[str]) -> None:
    """Wait until every router has nodes and knows all that will be asked for."""
    deadline_s = time.monotonic() + _READY_S
    for name in cluster.routers:
        address = cluster.address(name)
        while True:
            try:
                async with (
                    session.get(f"{address}/v1/models") as models,
                    session.get(f"{address}/health") as health,
                ):
                    known = {each["id"] for each in (await models.json())["data"]}
                    if health.status == 200 and names <= known:
                        break
            except (aiohttp.ClientError, ConnectionError, TimeoutError):
                pass
            if time.monotonic() > deadline_s:
                raise ValueError(
                    f"{name} was not ready within {_READY_S:g} s: see the logs in {cluster.plan.work}"
                )
            await asyncio.sleep(0.5)


def _network(options: argparse.Namespace, names: Sequence[str]) -> Network | None:
    """Open the network that was asked for; without it, if this machine allows none, say so."""
    if not options.namespaces:
        return None
    network = Network(names)
    try:
        network.open()
    except NetworkRefused as error:
        sys.stderr.write(f"no network namespaces here, so links are left alone ({error})\n")
        return None
    return network


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=count, default=4)
    parser.add_argument("--routers", type=count, default=2)
    parser.add_argument("--adapters", type=count, default=200)
    parser.add_argument("--words", type=count, default=12, help="different words to ask of each task")
    parser.add_argument("--tokens", type=count, default=192, help="most tokens of an answer; 16 at least")
    parser.add_argument("--rate", type=positive, default=4.0, help="requests a second, in the mean")
    parser.add_argument("--seconds", type=positive, default=60.0)
    parser.add_argument(
        "--every", type=positive, default=4.0, help="seconds from one fault to the next, in the mean"
    )
    parser.add_argument(
        "--rolling", action="store_true", help="restart each member in turn, and no other fault"
    )
    parser.add_argument(
        "--namespaces", action="store_true", help="a network namespace for each member; cut links too"
    )
    parser.add_argument(
        "--traces", type=Path, help="folder of azure_llm_2023_conv.csv; none: arrivals are drawn"
    )
    parser.add_argument(
        "--ttft", type=positive, default=30.0, help="within which a first token is to come, in s"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="folder for adapters and logs; none: one that is removed")
    parser.add_argument("--out", type=Path, help="file for the rows, compressed by gzip")
    return parser.parse_args(arguments)


def _end(_number: int, _frame: object) -> None:
    """End by way of what is to be cleared away: namespaces and members."""
    sys.exit(_TERMINATED)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; 0 if nothing was lost, cut off or wrong."""
    options = _options(arguments)
    signal.signal(signal.SIGTERM, _end)
    with one_line("scripts.chaos"), tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).absolute()
        copies = plan_copies(options.adapters, options.seed)
        adapters = work / f"adapters-{options.adapters}-{options.seed}"
        write_copies(copies, adapters, options.seed)
        rng = np.random.default_rng(options.seed)
        arriving = calls(options.traces, options.rate, options.seconds, rng)
        answers = Answers(options.words, options.tokens, options.seed)
        asked = draw_questions(copies, answers, arriving, rng)
        limits = (
            "--drain-s",
            "5",
            "--slo-ttft-s",
            str(options.ttft),
            "--slo-tbt-s",
            "2",
            "--log-level",
            "info",
        )
        plan = ClusterPlan(options.nodes, options.routers, adapters, work, limits)
        network = _network(options, plan.names)
        try:
            records = asyncio.run(run(options, ClusterProcesses(plan, network), asked, answers))
        finally:
            if network is not None:
                network.close()
        told = {
            key: value for key, value in vars(options).items() if key not in ("work", "out", "traces")
        } | {"namespaces": network is not None, "arrivals": "Azure's trace" if options.traces else "Poisson"}
        if options.out is not None:
            records.write(options.out, told)
    sys.stdout.write(json.dumps(records.summary(), indent=1) + "\n")
    return 0 if records.is_sound else 1


if __name__ == "__main__":
    sys.exit(main())
