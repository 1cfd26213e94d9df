"""Every policy by name: ours, the paper's, the baselines, and ours with one idea taken away at a time.

A policy is a composition: demand, placement, when to place anew, routing, and which cached adapters go first.
The capacity planner, the figures and the live cluster choose from this one list.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from scheduler.cluster.coordinator import Coordinator, CoordinatorOptions
from scheduler.cluster.cost import CostModel
from scheduler.cluster.demand import DemandOptions, DemandSource, DemandTracker
from scheduler.cluster.eviction import CheapestEviction, EvictionPolicy, LruEviction
from scheduler.cluster.forecast import ROOMY, Forecast
from scheduler.cluster.foresight import ForeseenDemand, Foresight
from scheduler.cluster.placement.ablated import ForgetfulPlacement, WholePlacement
from scheduler.cluster.placement.base import Measure, PlacementPolicy, Utilisation
from scheduler.cluster.placement.first_fit import FirstFitPlacement
from scheduler.cluster.placement.hashed import HashedPlacement
from scheduler.cluster.placement.loraserve import LoraservePlacement
from scheduler.cluster.placement.replicated import ReplicatedPlacement
from scheduler.cluster.placement.slora import ContiguousPlacement, RandomPlacement
from scheduler.cluster.placement.stratified import StepMeasure, StratifiedOptions, StratifiedPlacement
from scheduler.cluster.placement.terraced import TerracedOptions, TerracedPlacement
from scheduler.cluster.planning import Planner, PlanningOptions
from scheduler.cluster.profile import Lengths, Limits, Slo
from scheduler.cluster.routing.base import RoutingPolicy
from scheduler.cluster.routing.least_loaded import LeastLoadedRouting
from scheduler.cluster.routing.phi import PhiRouting
from scheduler.cluster.routing.predicted import PredictedRouting
from scheduler.cluster.routing.toppings import ToppingsRouting


class UnknownPolicy(ValueError):
    """A name that no policy has; says which there are."""


class NoForesight(ValueError):
    """A policy that knows the future was asked for where nobody does."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What a policy is made for: the nodes' cost model (it names the kernels) and limits, the SLO, the mean
    request, the seed of what is drawn, and, in replays, the future."""

    model: CostModel
    slo: Slo
    mean_output_tokens: float = 256.0
    seed: int = 0
    foresight: Foresight | None = None
    mean_prompt_tokens: float = 1024.0
    limits: Limits = ROOMY

    @property
    def forecast(self) -> Forecast:
        """Of such nodes for such requests."""
        return Forecast(self.model, Lengths(self.mean_prompt_tokens, self.mean_output_tokens), self.limits)


Made = Callable[[Setting], PlacementPolicy]


def _tracked(setting: Setting) -> DemandSource:
    return DemandTracker(DemandOptions())


def _foreseen(setting: Setting) -> DemandSource:
    if setting.foresight is None:
        raise NoForesight("foresight=None: oracle demand needs a replay; give the arrivals' foresight")
    return ForeseenDemand(setting.foresight)


def _terraced(setting: Setting) -> PlacementPolicy:
    return TerracedPlacement(setting.model.kernel, TerracedOptions(slack=0.05))


def _stratified(setting: Setting) -> PlacementPolicy:
    return StratifiedPlacement(setting.forecast)


def _lone(setting: Setting) -> PlacementPolicy:
    return StratifiedPlacement(setting.forecast, StratifiedOptions(covered=0.0))


def _utilisation(setting: Setting) -> Measure:
    return Utilisation(setting.model.kernel)


def _steps(setting: Setting) -> Measure:
    return StepMeasure(setting.forecast, setting.slo.tbt_s)


def _random(setting: Setting) -> PlacementPolicy:
    return RandomPlacement(np.random.default_rng(setting.seed))


def _phi(setting: Setting) -> RoutingPolicy:
    return PhiRouting()


def _predicted(setting: Setting) -> RoutingPolicy:
    return PredictedRouting(setting.forecast, setting.slo.ttft_s)


def _toppings(setting: Setting) -> RoutingPolicy:
    return ToppingsRouting(setting.model, setting.mean_output_tokens, setting.slo.tbt_s)


@dataclass(frozen=True, slots=True)
class Policy:
    """One composition; `note` is its line in a table or a legend."""

    name: str
    note: str
    placement: Made
    routing: Callable[[Setting], RoutingPolicy] = _phi
    demand: Callable[[Setting], DemandSource] = _tracked
    measure: Callable[[Setting], Measure] = _utilisation
    planning: PlanningOptions = PlanningOptions()  # noqa: RUF009
    eviction: EvictionPolicy = LruEviction()  # noqa: RUF009

    def coordinator(self, setting: Setting) -> Callable[[int], Coordinator]:
        """Makes the coordinator of a given epoch."""

        def of(epoch: int) -> Coordinator:
            planner = Planner(self.placement(setting), self.measure(setting), self.planning)
            return Coordinator(planner, self.demand(setting), CoordinatorOptions(), epoch)

        return of


_NEVER = PlanningOptions(comfort=float("inf"))
_OURS = Policy(
    "ours",
    "strata of rank by forecast step, standbys, routing by predicted cost",
    _stratified,
    _predicted,
    measure=_steps,
    planning=PlanningOptions(comfort=0.25),
    eviction=CheapestEviction(),
)
_PAPER = Policy("paper", "LoRAServe (arXiv 2511.22880)", lambda setting: LoraservePlacement())

_BASELINES = (
    Policy("slora-random", "S-LoRA Random: one home by chance", _random),
    Policy("slora-contiguous", "S-LoRA Contiguous: one home by name", lambda setting: ContiguousPlacement()),
    Policy("first-fit", "bin packing blind to rank", lambda setting: FirstFitPlacement()),
    Policy("rendezvous", "one home by hash", lambda setting: HashedPlacement()),
    Policy(
        "least-loaded",
        "everything everywhere, fewest requests",
        lambda setting: ReplicatedPlacement(),
        lambda setting: LeastLoadedRouting(),
    ),
    Policy(
        "toppings",
        "everything everywhere, least cost to others",
        lambda setting: ReplicatedPlacement(),
        _toppings,
    ),
)

_ABLATIONS = (
    replace(
        _OURS,
        name="ours-no-splitting",
        note="every adapter on one node",
        placement=lambda setting: WholePlacement(_stratified(setting)),
    ),
    replace(
        _OURS,
        name="ours-no-permutation",
        note="placed anew, whatever lies where",
        placement=lambda setting: ForgetfulPlacement(_stratified(setting)),
    ),
    replace(_OURS, name="ours-no-replacement", note="stays as first placed", planning=_NEVER),
    replace(
        _OURS,
        name="ours-routing-only",
        note="our routing over everything everywhere",
        placement=lambda setting: ReplicatedPlacement(),
    ),
    replace(
        _OURS,
        name="ours-no-spilling",
        note="requests only go where the plan has the adapter",
        routing=lambda setting: PredictedRouting(setting.forecast, float("inf")),
    ),
    replace(_OURS, name="ours-placement-only", note="our placement, a draw from φ", routing=_phi),
    replace(_OURS, name="ours-no-standbys", note="copies only where the plan needs them", placement=_lone),
    replace(
        _OURS,
        name="ours-operating-points",
        note="load by operating points and largest ranks instead of forecasts",
        placement=_terraced,
        measure=_utilisation,
    ),
    replace(_OURS, name="ours-lru-store", note="cached adapters go by last use", eviction=LruEviction()),
    replace(_OURS, name="ours-oracle-demand", note="true rates instead of projected", demand=_foreseen),
    replace(_PAPER, name="paper-our-routing", note="the paper's placement, our routing", routing=_predicted),
    replace(_PAPER, name="paper-oracle-demand", note="the paper's, true rates", demand=_foreseen),
)

POLICIES: Mapping[str, Policy] = MappingProxyType(
    {policy.name: policy for policy in (_OURS, _PAPER, *_BASELINES, *_ABLATIONS)}
)
BASELINES: tuple[str, ...] = ("paper", *(policy.name for policy in _BASELINES))
ABLATIONS: tuple[str, ...] = tuple(policy.name for policy in _ABLATIONS)


def named(name: str) -> Policy:
    """The policy of that name; raises UnknownPolicy."""
    if name not in POLICIES:
        raise UnknownPolicy(f"policy={name!r} is not known: choose from {', '.join(POLICIES)}")
    return POLICIES[name]
