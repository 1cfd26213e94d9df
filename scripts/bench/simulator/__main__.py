"""Measure what deciding and simulating cost: the time to place, to replay an hour, and per event as a cluster grows.

    python -m scripts.bench.simulator --traces FOLDER

It measures four things:

    place    ours, 10,000 adapters on 256 nodes: from nothing, then after demand has drifted
    route    ours, 10,000 adapters on 4, 64 and 256 nodes at ease and busy: microseconds for each decision
    hour     an Azure trace of one hour on 16 derived H100 nodes, seconds of one core
    growth   4 to 64 nodes with the same load on each: microseconds for each step and token
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import numpy as np

from lora.adapter import AdapterRef
from scheduler.cluster.cost.model import Kernel
from scheduler.cluster.cost.profile import Slo
from scheduler.cluster.placement.base import Problem
from scheduler.cluster.policies import Setting
from scheduler.cluster.state import EMPTY_PLACEMENT, Demand, NodeState, Placement
from scheduler.sim.ablations.named_policies import named
from scheduler.sim.replay import Hardware, Workload, fitted, replay
from scheduler.sim.workload.adapters import EQUAL, catalogue
from scheduler.sim.workload.popularity import PowerLaw, assigned
from scheduler.sim.workload.trace import paced
from scripts.arguments import one_line
from scripts.bench.machine import OtherProcesses, describe
from scripts.bench.simulator.routing import time_routing
from scripts.figures.cluster_run import GIB, Traces, read_traces
from scripts.figures.roofline import H100, LLAMA_8B, derived
from scripts.figures.rows import SuiteRows
from scripts.results import Row

PROFILE = derived(LLAMA_8B, H100, Slo(2.0, 0.05))
GROWTH = (4, 8, 16, 32, 64)

Result = TypeVar("Result")


def timed(work: Callable[[], Result]) -> tuple[Result, dict[str, float]]:
    """Run the work; measure processor and wall seconds, and the cores that others used meanwhile."""
    with OtherProcesses() as others:
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        value = work()
        cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - wall_s
    figures = {"cpu_s": cpu_s, "wall_s": wall_s, "others_cores": others.cores}
    return value, {name: round(each, 4) for name, each in figures.items()}


def problem(adapters: int, nodes: int, kernel: Kernel) -> Problem:
    """Make adapters of equal ranks under a power law, at seven tenths of what the nodes sustain."""
    refs = catalogue(adapters, EQUAL)
    points = PROFILE.operating_points(kernel, (8, 16, 32, 64, 128))
    weights = np.random.default_rng(0).permutation(
        PowerLaw(0.3).weights(np.zeros(adapters, dtype=np.int64), 0.0)
    )
    rates = 0.7 * nodes * points.at(64) * weights
    demand = Demand(MappingProxyType(dict(zip(refs, rates.tolist(), strict=True))))
    states = tuple(NodeState(f"n{at}", 16 * GIB, points) for at in range(nodes))
    return Problem(demand, states, EMPTY_PLACEMENT)


def drifted(before: Problem, placement: Placement) -> Problem:
    """Change every rate by up to half, as time would; nodes hold what was placed on them."""
    rng = np.random.default_rng(1)
    rates = {ref: rate * float(rng.uniform(0.5, 1.5)) for ref, rate in before.demand.tokens_per_s.items()}
    held: dict[str, list[AdapterRef]] = {state.node: [] for state in before.nodes}
    for ref, shares in placement.shares.items():
        for share in shares:
            held[share.node].append(ref)
    nodes = tuple(replace(state, held=tuple(held[state.node])) for state in before.nodes)
    return Problem(Demand(MappingProxyType(rates)), nodes, placement)


def place(adapters: int, nodes: int, kernel: Kernel) -> Row:
    """Time both placements."""
    policy = named("ours").placement(Setting(PROFILE.model(kernel), PROFILE.slo))
    first = problem(adapters, nodes, kernel)
    placement, fresh = timed(lambda: policy.place(first))
    later = drifted(first, placement)
    _, again = timed(lambda: policy.place(later))
    return {"from_nothing": fresh, "after_drift": again}


def simulate(traces: Traces, nodes: int, rate: float | None, seconds: float) -> Row:
    """Time the simulation of `rate` requests/s of the conversation trace, its own pace where None."""
    calls = [call for call in traces["conv"] if call.arrival_s < seconds]
    if rate is not None:
        calls = paced(traces["conv"], rate, seconds)
    adapters = catalogue(100, EQUAL)
    arrivals = assigned(calls, adapters, PowerLaw(0.3), np.random.default_rng(0))
    traffic = Workload(arrivals, adapters, seconds)
    hardware = fitted(Hardware(PROFILE, Kernel.EXACT, 32 * GIB), traffic)
    done, figures = timed(lambda: replay(named("ours"), nodes, hardware, traffic, 0))
    tokens = sum(each.call.output_tokens for each in arrivals)
    counted = {"requests": len(arrivals), "output_tokens": tokens, "steps": done.steps}
    each = {
        "us_per_step": round(1e6 * figures["cpu_s"] / done.steps, 2),
        "us_per_token": round(1e6 * figures["cpu_s"] / tokens, 2),
    }
    return {**figures, **counted, **each, "ttft_p95_s": round(done.outcome.ttft_p95_s, 4)}


def measurements(traces: Traces, quick: bool) -> Mapping[str, Callable[[], Row]]:
    """List all measurements by name."""
    adapters, nodes, hour_s = (100, 4, 5.0) if quick else (10_000, 256, 3600.0)
    placing = {
        f"place {adapters} adapters on {nodes} nodes, {kernel.value}": (
            lambda kernel=kernel: place(adapters, nodes, kernel)
        )
        for kernel in (Kernel.EXACT, Kernel.PADDED)
    }
    routing = {
        f"route {adapters} adapters among {size} nodes, {'busy' if busy else 'at ease'}": (
            lambda size=size, busy=busy: time_routing(
                PROFILE, catalogue(adapters, EQUAL), size, 2 if quick else 20, busy
            )
        )
        for size in (4, 64, 256)
        for busy in (False, True)
    }
    hour = {f"hour of {hour_s:g} s on 16 nodes": lambda: simulate(traces, 16, None, hour_s)}
    sizes, seconds = (GROWTH[:2], 4.0) if quick else (GROWTH, 20.0)
    growth = {
        f"growth to {size} nodes": lambda size=size: simulate(traces, size, 1.5 * size, seconds)
        for size in sizes
    }
    return {**placing, **routing, **growth, **hour}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traces", type=Path, help="folder of azure_llm_2023_{code,conv}.csv")
    parser.add_argument("--only", default="", help="only what begins so")
    parser.add_argument("--out", type=Path, default=Path("results/bench_simulator.jsonl"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes and drawn traces")
    options = parser.parse_args(arguments)
    if not (options.traces or options.quick):
        parser.error("give --traces FOLDER or --quick")
    rows = SuiteRows(options.out)
    traces = read_traces(None if options.quick else options.traces)
    for name, measure in measurements(traces, options.quick).items():
        if name.startswith(options.only):
            row = rows.keep({"what": name}, {**measure(), "machine": describe()})
            print(json.dumps({key: value for key, value in row.items() if key != "machine"}))
    rows.tidy()


if __name__ == "__main__":
    with one_line("scripts.bench.simulator"):
        main()
