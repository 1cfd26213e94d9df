"""The problem as arrays, and which node has which ceiling. Indices: [nodes] as in `problem.nodes`,
[ranks] ascending over the ranks that occur."""

from dataclasses import dataclass

import numpy as np

from lora.adapter import AdapterRef
from scheduler.cluster.cost.model import Kernel
from scheduler.cluster.placement.assignment import best_assignment
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
class ProblemArrays:
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
    """Return tokens/s that an adapter which nobody asks for is taken to have."""
    rates = demand.tokens_per_s.values()
    return _IDLE * (sum(rates) / len(rates) or 1.0)


def problem_arrays(problem: Problem) -> ProblemArrays:
    """Put the problem in numbers."""
    asked = problem.demand.tokens_per_s
    level = {rank: at for at, rank in enumerate(sorted({ref.rank for ref in asked}))}
    idle = idle_rate(problem.demand)
    demand = {ref: max(rate, idle) for ref, rate in asked.items()}
    wanted = np.zeros(len(level))
    for ref, tokens in demand.items():
        wanted[level[ref.rank]] += tokens
    number = {state.node: at for at, state in enumerate(problem.nodes)}
    before = ((ref, number[node], part) for ref in demand for node, part in surviving(problem, ref))
    return ProblemArrays(
        problem, level, rate_table(problem.nodes, list(level)), demand, wanted, tuple(before)
    )


def ceiling_problem(arrays: ProblemArrays, kernel: Kernel, slack: float) -> CeilingProblem:
    """Choose ceilings and the least target, exceeded by `slack` (relative).

    Where ranks do not disturb each other every ceiling is the highest.
    """
    if not kernel.mixes:
        ceilings = np.full(len(arrays.rates), len(arrays.wanted) - 1)
        target = float((arrays.wanted / arrays.rates.sum(0)).sum())
    else:
        ceilings = _assign_ceilings(arrays, slack)
        target = least_target(arrays.rates, arrays.wanted, ceilings)
    return CeilingProblem(interference(arrays.rates, ceilings, kernel), target * (1 + slack))


def _assign_ceilings(arrays: ProblemArrays, slack: float) -> Ints:
    """Return the present ceilings, if they still do.

    Else return the best, each taken by the node that keeps most bytes under it. Only nodes that are alike may
    change places.
    """
    tokens, nbytes, present = _present(arrays)
    best = choose_ceilings(arrays.rates, arrays.wanted, present)
    target = least_target(arrays.rates, arrays.wanted, best)
    if least_target(arrays.rates, arrays.wanted, present) <= target * (1 + slack + 1e-9):
        return present
    quota = _quotas(arrays, best, target)
    part = np.minimum(1.0, quota[best][None, :, :] / np.maximum(tokens, 1e-30)[:, None, :])
    stays = (nbytes[:, None, :] * part).sum(2) / max(1.0, float(nbytes.sum()))
    alike = (arrays.rates[:, None, :] == arrays.rates[None, :, :]).all(2)
    return best[best_assignment(np.where(alike, stays, -1e6))]


def _present(arrays: ProblemArrays) -> tuple[Floats, Floats, Ints]:
    """Return tokens/s and bytes [nodes, ranks] where they were before, and the index of the largest rank
    [nodes]."""
    tokens, nbytes = np.zeros_like(arrays.rates), np.zeros_like(arrays.rates)
    present = np.zeros(len(arrays.rates), dtype=np.int64)
    for ref, node, part in arrays.before:
        level = arrays.level[ref.rank]
        tokens[node, level] += arrays.demand[ref] * part
        nbytes[node, level] += ref.nbytes
        present[node] = max(present[node], level)
    return tokens, nbytes, present


def _quotas(arrays: ProblemArrays, ceilings: Ints, target: float) -> Floats:
    """Return [ceilings, ranks] the tokens/s of each rank that one node of each ceiling will take.

    High ceilings fill with the highest ranks first.
    """
    ranks = len(arrays.wanted)
    left = arrays.wanted.copy()
    quota = np.zeros((ranks, ranks))
    for ceiling in range(ranks - 1, -1, -1):
        members = np.flatnonzero(ceilings == ceiling)
        room = target * float(arrays.rates[members, ceiling].sum())
        for rank in range(ceiling, -1, -1):
            taken = min(room, left[rank])
            room -= taken
            left[rank] -= taken
            quota[ceiling, rank] = taken / max(1, len(members))
    return quota
