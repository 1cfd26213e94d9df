"""Policies by name: ours, the paper's and the baselines.

A policy is a composition: demand, placement, when to place anew, routing, and who makes room on a node.
The live cluster chooses from this list; ablations of ours are in scheduler.sim.ablations.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from lora.adapter import AdapterRef
from lora.memory.base import ResidencyPolicy
from scheduler.cluster.coordinator.coordinator import Coordinator, CoordinatorOptions
from scheduler.cluster.coordinator.demand import DemandOptions, DemandSource, DemandTracker
from scheduler.cluster.coordinator.replan import Replanner, ReplanOptions
from scheduler.cluster.cost.forecast import ROOMY, Forecast
from scheduler.cluster.cost.model import CostModel
from scheduler.cluster.cost.profile import Lengths, Limits, Slo
from scheduler.cluster.placement.balanced import BalancedPlacement, StepMeasure
from scheduler.cluster.placement.base import Measure, PlacementPolicy, Utilisation
from scheduler.cluster.placement.baselines import (
    ContiguousPlacement,
    FirstFitPlacement,
    HashedPlacement,
    RandomPlacement,
    ReplicatedPlacement,
)
from scheduler.cluster.placement.loraserve import LoraservePlacement
from scheduler.cluster.routing.base import RoutingPolicy
from scheduler.cluster.routing.baselines import LeastLoadedRouting, ToppingsRouting, WeightedRouting
from scheduler.cluster.routing.cost_estimator import CostEstimator
from scheduler.cluster.routing.load_view import LoadView
from scheduler.cluster.routing.predicted_cost import PredictedCostRouting
from scheduler.cluster.routing.prefix_index import CHUNK_TOKENS
from scheduler.cluster.routing.router import Router, RouterOptions
from scheduler.cluster.routing.slo_admission import SloAdmission
from scheduler.residency import CheapestWindow

KnownRates = Callable[[float, float], Mapping[AdapterRef, float]]
"""(from s, to s) → input plus output tokens/s of the adapters that will be asked for in between."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What a policy is made for: the nodes' cost model (it names the kernels) and limits, the SLO and the
    mean request.

    `seed` is of what is drawn. In replays `known_rates` is the future. `others` are the profile's models of other
    kernels, which nodes may turn out to have. There are so many `routers`; tenants not in
    `weights` weigh 1.
    """

    model: CostModel
    slo: Slo
    mean_output_tokens: float = 256.0
    seed: int = 0
    known_rates: KnownRates | None = None
    mean_prompt_tokens: float = 1024.0
    limits: Limits = ROOMY
    routers: int = 2
    others: tuple[CostModel, ...] = ()
    weights: Mapping[str, float] | None = None

    @property
    def forecast(self) -> Forecast:
        """Return the forecast of such nodes for such requests."""
        lengths = Lengths(self.mean_prompt_tokens, self.mean_output_tokens)
        return Forecast(self.model, lengths, self.limits, self.others)


MakeRouter = Callable[[np.random.Generator], Router]
MakePlacement = Callable[[Setting], PlacementPolicy]


def _tracked(setting: Setting) -> DemandSource:
    return DemandTracker(DemandOptions())


def balanced(setting: Setting) -> PlacementPolicy:
    """Make our placement."""
    return BalancedPlacement(setting.forecast)


def utilisation(setting: Setting) -> Measure:
    """Measure a placement by its busiest node's utilisation."""
    return Utilisation(setting.model.kernel)


def _steps(setting: Setting) -> Measure:
    return StepMeasure(setting.forecast, setting.slo.tbt_s)


def _random(setting: Setting) -> PlacementPolicy:
    return RandomPlacement(np.random.default_rng(setting.seed))


def weighted(setting: Setting) -> RoutingPolicy:
    """Route by φ alone."""
    return WeightedRouting()


def predicted_cost(setting: Setting) -> RoutingPolicy:
    """Make our routing."""
    return PredictedCostRouting(CostEstimator(setting.forecast), setting.slo)


def _toppings(setting: Setting) -> RoutingPolicy:
    return ToppingsRouting(setting.model, setting.mean_output_tokens, setting.slo.tbt_s)


def admitted(setting: Setting) -> SloAdmission | None:
    """Make the admission that all policies have where the SLO is kept at the door."""
    return SloAdmission(CostEstimator(setting.forecast), setting.slo)


def unbounded(setting: Setting) -> SloAdmission | None:
    """Make none: every request is sent at once."""
    return None


@dataclass(frozen=True, slots=True)
class Policy:
    """One composition; `note` is its line in a table or a legend."""

    name: str
    note: str
    placement: MakePlacement
    routing: Callable[[Setting], RoutingPolicy] = weighted
    demand: Callable[[Setting], DemandSource] = _tracked
    measure: Callable[[Setting], Measure] = utilisation
    planning: ReplanOptions = ReplanOptions()  # noqa: RUF009
    residency: ResidencyPolicy = CheapestWindow()  # noqa: RUF009
    admission: Callable[[Setting], SloAdmission | None] = admitted
    learns: bool = True  # nodes tell what their steps turn out to cost

    def router(self, setting: Setting) -> MakeRouter:
        """Return what makes the decisions of one router, which draws from the given rng."""

        def of(rng: np.random.Generator) -> Router:
            node_chunks = max(1, setting.limits.kv_tokens // CHUNK_TOKENS)
            return Router(
                self.routing(setting),
                self.admission(setting),
                LoadView(setting.routers),
                rng,
                RouterOptions(node_chunks=node_chunks),
                setting.weights,
            )

        return of

    def coordinator(self, setting: Setting) -> Callable[[int], Coordinator]:
        """Return what makes the coordinator of a given epoch."""

        def of(epoch: int) -> Coordinator:
            planner = Replanner(self.placement(setting), self.measure(setting), self.planning)
            return Coordinator(planner, self.demand(setting), CoordinatorOptions(), epoch)

        return of


OURS = Policy(
    "ours",
    "runs of rank by forecast step, routing by predicted cost",
    balanced,
    predicted_cost,
    measure=_steps,
    planning=ReplanOptions(comfort=0.25),
)
PAPER = Policy("paper", "LoRAServe (arXiv 2511.22880)", lambda setting: LoraservePlacement())

BASELINE_POLICIES: tuple[Policy, ...] = (
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
POLICIES: Mapping[str, Policy] = {policy.name: policy for policy in (OURS, PAPER, *BASELINE_POLICIES)}
