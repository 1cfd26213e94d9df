"""The problem as arrays, and which node stands on which ceiling. Indices: [nodes] as in `problem.nodes`,
[ranks] ascending over the ranks that occur."""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from lora.adapter import AdapterRef
from scheduler.cluster.cost.model import Kernel
from scheduler.cluster.placement.base import Problem, surviving
from scheduler.cluster.state import Demand
from scheduler.sim.ablations.rank_ceilings import (
    Floats,
    Ints,
    choose_ceilings,
    interference,
    least_target,
    rate_table,
)

_IDLE = 1e-6  # the demand of an adapter that nobody asks for, in parts of the mean: it still needs a place


@dataclass(frozen=True, slots=True)
class Survey:
    """`level` is each rank's index; `rates` [nodes, ranks] tokens/s that a node sustains of a rank alone;
    `demand` tokens/s by adapter, none 0; `wanted` [ranks] its sums; `before` (adapter, node, part) of the
    shares of the placement before, on nodes that are still there."""

    problem: Problem
    level: dict[int, int]
    rates: Floats
    demand: dict[AdapterRef, float]
    wanted: Floats
    before: tuple[tuple[AdapterRef, int, float], ...]


@dataclass(frozen=True, slots=True)
class CeilingProblem:
    """`seconds` [nodes, ranks] of a node's time that a token of each rank takes, infinite above the node's
    ceiling; `target` the utilisation that the busiest node is to have."""

    seconds: Floats
    target: float


def idle_rate(demand: Demand) -> float:
    """Tokens/s that an adapter which nobody asks for is taken to have."""
    rates = demand.tokens_per_s.values()
    return _IDLE * (sum(rates) / len(rates) or 1.0)


def survey(problem: Problem) -> Survey:
    """The problem in numbers."""
    asked = problem.demand.tokens_per_s
    level = {rank: at for at, rank in enumerate(sorted({ref.rank for ref in asked}))}
    idle = idle_rate(problem.demand)
    demand = {ref: max(rate, idle) for ref, rate in asked.items()}
    wanted = np.zeros(len(level))
    for ref, tokens in demand.items():
        wanted[level[ref.rank]] += tokens
    number = {state.node: at for at, state in enumerate(problem.nodes)}
    before = ((ref, number[node], part) for ref in demand for node, part in surviving(problem, ref))
    return Survey(problem, level, rate_table(problem.nodes, list(level)), demand, wanted, tuple(before))


def ceiling_problem(ground: Survey, kernel: Kernel, slack: float) -> CeilingProblem:
    """Ceilings and the least target, exceeded by `slack` (relative). Where ranks do not disturb each other
    every ceiling is the highest."""
    if kernel is Kernel.EXACT:
        ceilings = np.full(len(ground.rates), len(ground.wanted) - 1)
        target = float((ground.wanted / ground.rates.sum(0)).sum())
    else:
        ceilings = _stand(ground, slack)
        target = least_target(ground.rates, ground.wanted, ceilings)
    return CeilingProblem(interference(ground.rates, ceilings, kernel), target * (1 + slack))


def _stand(ground: Survey, slack: float) -> Ints:
    """The present ceilings, if they still do; else the best, each taken by the node that keeps most bytes
    under it. Only nodes that are alike may change places."""
    tokens, nbytes, present = _present(ground)
    best = choose_ceilings(ground.rates, ground.wanted, present)
    target = least_target(ground.rates, ground.wanted, best)
    if least_target(ground.rates, ground.wanted, present) <= target * (1 + slack + 1e-9):
        return present
    quota = _quotas(ground, best, target)
    part = np.minimum(1.0, quota[best][None, :, :] / np.maximum(tokens, 1e-30)[:, None, :])
    stays = (nbytes[:, None, :] * part).sum(2) / max(1.0, float(nbytes.sum()))
    alike = (ground.rates[:, None, :] == ground.rates[None, :, :]).all(2)
    node, taken = linear_sum_assignment(np.where(alike, stays, -1e6), maximize=True)
    ceilings = np.zeros_like(best)
    ceilings[node] = best[taken]
    return ceilings


def _present(ground: Survey) -> tuple[Floats, Floats, Ints]:
    """Tokens/s and bytes [nodes, ranks] where they were before, and the index of the largest rank [nodes]."""
    tokens, nbytes = np.zeros_like(ground.rates), np.zeros_like(ground.rates)
    present = np.zeros(len(ground.rates), dtype=np.int64)
    for ref, node, part in ground.before:
        level = ground.level[ref.rank]
        tokens[node, level] += ground.demand[ref] * part
        nbytes[node, level] += ref.nbytes
        present[node] = max(present[node], level)
    return tokens, nbytes, present


def _quotas(ground: Survey, ceilings: Ints, target: float) -> Floats:
    """[ceilings, ranks]: tokens/s of each rank that one node of each ceiling will take, when high ceilings
    fill with the highest ranks first."""
    ranks = len(ground.wanted)
    left = ground.wanted.copy()
    quota = np.zeros((ranks, ranks))
    for ceiling in range(ranks - 1, -1, -1):
        members = np.flatnonzero(ceilings == ceiling)
        room = target * float(ground.rates[members, ceiling].sum())
        for rank in range(ceiling, -1, -1):
            taken = min(room, left[rank])
            room -= taken
            left[rank] -= taken
            quota[ceiling, rank] = taken / max(1, len(members))
    return quota
