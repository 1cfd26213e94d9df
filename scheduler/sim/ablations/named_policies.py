"""Every policy by name: those that a cluster runs, and ours with one idea taken away at a time.

The capacity planner and the figures choose from this list.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import numpy as np

from lora.memory.base import Occupant
from scheduler.cluster.coordinator.demand import DemandSource
from scheduler.cluster.coordinator.replan import ReplanOptions
from scheduler.cluster.placement.base import PlacementPolicy
from scheduler.cluster.placement.baselines import ReplicatedPlacement
from scheduler.cluster.policies import (
    BASELINE_POLICIES,
    OURS,
    PAPER,
    Policy,
    Setting,
    balanced,
    predicted_cost,
    unbounded,
    utilisation,
    weighted,
)
from scheduler.cluster.routing.base import Loads, RouteRequest, RoutingPolicy
from scheduler.cluster.state import RoutingTable
from scheduler.residency import CheapestWindow
from scheduler.sim.ablations.oracle_demand import OracleDemand
from scheduler.sim.ablations.placements import (
    ForgetfulPlacement,
    RankCeilingOptions,
    RankCeilingPlacement,
    WholePlacement,
)


class UnknownPolicy(ValueError):
    """A name that no policy has; says which there are."""


class NoKnownRates(ValueError):
    """A policy that knows the future was asked for where nobody does."""


def _oracle(setting: Setting) -> DemandSource:
    if setting.known_rates is None:
        raise NoKnownRates("known_rates=None: oracle demand needs a replay; give the arrivals' rates")
    return OracleDemand(setting.known_rates)


def _rank_ceilings(setting: Setting) -> PlacementPolicy:
    return RankCeilingPlacement(setting.model.kernel, RankCeilingOptions(slack=0.05))


def _no_splitting(setting: Setting) -> PlacementPolicy:
    return WholePlacement(balanced(setting))


def _no_permutation(setting: Setting) -> PlacementPolicy:
    return ForgetfulPlacement(balanced(setting))


def _everything_everywhere(setting: Setting) -> PlacementPolicy:
    return ReplicatedPlacement()


def _no_spilling(setting: Setting) -> RoutingPolicy:
    return HomeRouting(predicted_cost(setting))


class LastUseLoss:
    """EvictionLoss by which the least recently used goes first: any set of older adapters is worth less than one."""

    def losses(self, occupants: Sequence[Occupant], step: int) -> Sequence[int]:
        """Return 2^k for the k-th in order of last use."""
        order = sorted(range(len(occupants)), key=lambda at: occupants[at].usage.used_step)
        return [1 << at for _, at in sorted((each, at) for at, each in enumerate(order))]


class HomeRouting:
    """Routes as another policy does, but only to nodes that the plan names, if one of them can be reached."""

    def __init__(self, policy: RoutingPolicy) -> None:
        self._policy = policy

    def route(self, ask: RouteRequest, table: RoutingTable, loads: Loads, rng: np.random.Generator) -> str:
        """Hide the other nodes."""
        homes = {s.node: loads[s.node] for s in table.shares.get(ask.adapter, ()) if s.node in loads}
        return self._policy.route(ask, table, homes or loads, rng)


_NEVER = ReplanOptions(comfort=float("inf"))
_ABLATIONS: tuple[Policy, ...] = (
    replace(
        OURS,
        name="ours-no-splitting",
        note="every adapter on one node",
        placement=_no_splitting,
    ),
    replace(
        OURS,
        name="ours-no-permutation",
        note="placed anew, whatever lies where",
        placement=_no_permutation,
    ),
    replace(OURS, name="ours-no-replacement", note="stays as first placed", planning=_NEVER),
    replace(
        OURS,
        name="ours-routing-only",
        note="our routing over everything everywhere",
        placement=_everything_everywhere,
    ),
    replace(
        OURS,
        name="ours-no-spilling",
        note="requests only go where the plan has the adapter",
        routing=_no_spilling,
    ),
    replace(OURS, name="ours-placement-only", note="our placement, a draw from φ", routing=weighted),
    replace(
        OURS,
        name="ours-operating-points",
        note="load by operating points and largest ranks instead of forecasts",
        placement=_rank_ceilings,
        measure=utilisation,
    ),
    replace(
        OURS,
        name="ours-lru-store",
        note="cached adapters go by last use",
        residency=CheapestWindow(LastUseLoss()),
    ),
    replace(OURS, name="ours-no-learning", note="costs as the profile says", learns=False),
    replace(OURS, name="ours-no-admission", note="every request is sent at once", admission=unbounded),
    replace(OURS, name="ours-oracle-demand", note="true rates instead of projected", demand=_oracle),
    replace(
        PAPER, name="paper-our-routing", note="the paper's placement, our routing", routing=predicted_cost
    ),
    replace(PAPER, name="paper-oracle-demand", note="the paper's, true rates", demand=_oracle),
)

POLICIES: Mapping[str, Policy] = MappingProxyType(
    {policy.name: policy for policy in (OURS, PAPER, *BASELINE_POLICIES, *_ABLATIONS)}
)
BASELINES: tuple[str, ...] = (PAPER.name, *(policy.name for policy in BASELINE_POLICIES))
ABLATIONS: tuple[str, ...] = tuple(policy.name for policy in _ABLATIONS)


def named(name: str) -> Policy:
    """Find the policy of that name; raises UnknownPolicy."""
    if name not in POLICIES:
        raise UnknownPolicy(f"policy={name!r} is not known: choose from {', '.join(POLICIES)}")
    return POLICIES[name]
