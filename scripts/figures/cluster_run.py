"""One simulated run of a cluster, as a question and its answer: what the cluster suites have in common."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from scheduler.cluster.cost.model import Kernel
from scheduler.cluster.cost.profile import Slo
from scheduler.sim.ablations.named_policies import named
from scheduler.sim.replay import Hardware, Replay, Workload, fitted, replay
from scheduler.sim.workload.adapters import catalogue, rank_mix
from scheduler.sim.workload.popularity import assigned, over, popularity
from scheduler.sim.workload.trace import Call, paced, poisson, read_trace
from scripts.figures.roofline import L40S, LLAMA_8B, derived
from scripts.figures.rows import SuiteRows
from scripts.results import Row

SLO = Slo(ttft_s=2.0, tbt_s=0.1)
PROFILE = derived(LLAMA_8B, L40S, SLO)
GIB = 2**30

Traces = Mapping[str, Sequence[Call]]


@dataclass(frozen=True, slots=True)
class ClusterRun:
    """A run of `policy` on `nodes` nodes with `memory_gib` for adapters on each, under one kind of kernels.

    It sends `rate` requests/s of a trace's shape for `seconds`, of which `warm_s` do not count. Before them
    come `lead_s` of silence, so that policies that copy everything everywhere have done so.
    """

    policy: str
    kernel: str = "padded"
    trace: str = "conv"
    ranks: str = "equal"
    law: str = "power:0.3"
    adapters: int = 100
    nodes: int = 4
    memory_gib: float = 32.0
    rate: float = 10.0
    seconds: float = 40.0
    warm_s: float = 15.0
    lead_s: float = 30.0
    seed: int = 0


def read_traces(folder: Path | None) -> Traces:
    """Read the two Azure traces of `folder`; draw stand-ins of like lengths if there is no folder."""
    if folder is None:
        rng = np.random.default_rng(0)
        return {"conv": poisson(20.0, 60.0, (1155, 40), rng), "code": poisson(20.0, 60.0, (2048, 28), rng)}
    return {
        name: read_trace((folder / f"azure_llm_2023_{name}.csv").read_text()) for name in ("conv", "code")
    }


def traffic(run: ClusterRun, traces: Traces) -> Workload:
    """Draw the traffic, the same for every policy and kernel.

    The seed says where in the trace it begins, and which adapters are popular.
    """
    rng = np.random.default_rng(run.seed)
    calls = traces[run.trace]
    mix = rank_mix(run.ranks)
    adapters = catalogue(run.adapters, mix)
    order: list[int] = rng.permutation(len(adapters)).tolist()
    shuffled = [adapters[at] for at in order]
    chosen = paced(calls, run.rate, run.seconds, int(rng.integers(len(calls))))
    arrivals = [
        replace(each, call=each.call.at(run.lead_s + each.call.arrival_s))
        for each in assigned(chosen, shuffled, over(popularity(run.law), mix), rng)
    ]
    return Workload(arrivals, adapters, run.lead_s + run.seconds, run.lead_s + run.warm_s)


def hardware(run: ClusterRun, offered: Workload) -> Hardware:
    """Make nodes whose operating points are for this traffic's mean request."""
    return fitted(Hardware(PROFILE, Kernel(run.kernel), int(run.memory_gib * GIB)), offered)


def simulate(run: ClusterRun, traces: Traces) -> Replay:
    """Simulate it."""
    offered = traffic(run, traces)
    return replay(named(run.policy), run.nodes, hardware(run, offered), offered, run.seed)


def answer(run: ClusterRun, traces: Traces) -> Row:
    """Simulate a run and give its figures as a row's answer."""
    done = simulate(run, traces)
    last, outcome = done.last, done.outcome
    return {
        "requests": outcome.requests,
        "refused": outcome.refused,
        "ttft_p50_s": round(outcome.ttft_p50_s, 4),
        "ttft_p95_s": round(outcome.ttft_p95_s, 4),
        "tbt_p50_s": round(outcome.tbt_p50_s, 5),
        "tbt_p95_s": round(outcome.tbt_p95_s, 5),
        "goodput": round(outcome.goodput, 3),
        "meets": outcome.meets(SLO),
        "pulls": last.pulls,
        "moved_gib": round(last.moved_bytes / GIB, 3),
        "kept_gib_per_node": round(last.kept_bytes / GIB / run.nodes, 3),
        "used_gib_per_node": round(last.used_bytes / GIB / run.nodes, 3),
    }


def everything_gib(run: ClusterRun) -> float:
    """Compute the size of all adapters: what each node would hold if every one were everywhere."""
    return sum(ref.nbytes for ref in catalogue(run.adapters, rank_mix(run.ranks))) / GIB


def ask(rows: SuiteRows, run: ClusterRun, traces: Traces) -> Row:
    """Find the row of a run, or simulate it."""
    return rows.ask(asdict(run), lambda: answer(run, traces))
