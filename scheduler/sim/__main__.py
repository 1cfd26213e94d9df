"""`python -m scheduler.sim plan`: trace, adapters and SLO in, nodes needed out. The one door of the simulator
to files and to the terminal."""

import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from pathlib import Path

import numpy as np

from scheduler.cluster.coordinator import Coordinator, CoordinatorOptions
from scheduler.cluster.cost import Kernel
from scheduler.cluster.demand import DemandOptions, DemandTracker
from scheduler.cluster.events import Machine
from scheduler.cluster.placement.terraced import TerracedOptions, TerracedPlacement
from scheduler.cluster.planning import Planner, PlanningOptions
from scheduler.cluster.profile import Profile, Slo, from_json
from scheduler.cluster.routing.predicted import PredictedRouting
from scheduler.sim.catalogue import MIXES, catalogue
from scheduler.sim.node import NodeSpec
from scheduler.sim.outcome import Outcome, summary
from scheduler.sim.plan import Trial, fewest, least_nodes, trials
from scheduler.sim.popularity import PowerLaw
from scheduler.sim.trace import read_trace
from scheduler.sim.workload import Arrival, assigned
from scheduler.sim.world import World, WorldSpec
from scheduler.step import StepLimits

_PROFILE = Path(__file__).parents[1] / "cluster" / "profiles" / "h100_llama8b.json"
_BLOCK_TOKENS = 64


def _parsed(arguments: list[str]) -> Namespace:
    parser = ArgumentParser(
        prog="python -m scheduler.sim", description="Simulate a cluster before buying it."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser(
        "plan", help="how many nodes a workload needs", formatter_class=ArgumentDefaultsHelpFormatter
    )
    plan.add_argument("trace", type=Path, help="CSV with TIMESTAMP, ContextTokens, GeneratedTokens")
    plan.add_argument("--profile", type=Path, default=_PROFILE, help="the node's profile, JSON")
    plan.add_argument("--kernel", choices=[kernel.value for kernel in Kernel], default="exact")
    plan.add_argument("--adapters", type=int, default=100)
    plan.add_argument("--mix", choices=list(MIXES), default="equal")
    plan.add_argument(
        "--alpha", type=float, default=0.3, help="popularity: 1 is uniform, smaller more skewed"
    )
    plan.add_argument("--adapter-gib", type=float, default=64.0, help="memory for adapters on each node")
    plan.add_argument("--ttft-s", type=float, help="P95 bound; the profile's unless given")
    plan.add_argument("--tbt-s", type=float, help="P95 bound; the profile's unless given")
    plan.add_argument(
        "--speedup", type=float, default=1.0, help="times faster that the trace's requests come"
    )
    plan.add_argument(
        "--seconds", type=float, default=600.0, help="how much of the trace, after speeding it up"
    )
    plan.add_argument("--most", type=int, default=64, help="nodes to try at most")
    plan.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def _arrivals(options: Namespace) -> list[Arrival]:
    calls = [call.at(call.arrival_s / options.speedup) for call in read_trace(options.trace.read_text())]
    calls = [call for call in calls if call.arrival_s < options.seconds]
    adapters = catalogue(options.adapters, MIXES[options.mix])
    return list(assigned(calls, adapters, PowerLaw(options.alpha), np.random.default_rng(options.seed)))


def _node(options: Namespace, profile: Profile) -> NodeSpec:
    kernel, limits = Kernel(options.kernel), profile.limits
    points = profile.operating_points(kernel, (8, 16, 32, 64, 128))
    steps = StepLimits(
        max_num_seqs=256,
        max_num_batched_tokens=limits.step_prompt_tokens,
        max_model_len=limits.kv_tokens // 2,
    )
    machine = Machine(int(options.adapter_gib * 2**30), points)
    blocks = limits.kv_tokens // _BLOCK_TOKENS
    return NodeSpec(machine, profile.model(kernel), steps, blocks, _BLOCK_TOKENS)


def _spec(nodes: int, node: NodeSpec, arrivals: list[Arrival]) -> WorldSpec:
    kernel = node.model.kernel

    def coordinator(epoch: int) -> Coordinator:
        placement = TerracedPlacement(kernel, TerracedOptions(slack=0.05))
        planner = Planner(placement, kernel, PlanningOptions())
        return Coordinator(planner, DemandTracker(DemandOptions()), CoordinatorOptions(), epoch)

    return WorldSpec(
        node=node,
        nodes=tuple(f"n{at}" for at in range(nodes)),
        adapters=tuple(dict.fromkeys(each.adapter for each in arrivals)),
        coordinator=coordinator,
        routing=PredictedRouting(node.model),
    )


def _line(trial: Trial) -> str:
    outcome = trial.outcome
    return (
        f"{trial.nodes:5d}  {outcome.ttft_p95_s:9.3f}  {1e3 * outcome.tbt_p95_s:9.2f}  {outcome.goodput:9.2f}  "
        f"{outcome.served:7d} of {outcome.requests:<7d}  {'enough' if trial.enough else 'too few'}\n"
    )


def _plan(options: Namespace) -> int:
    profile = from_json(options.profile.read_text())
    slo = Slo(options.ttft_s or profile.slo.ttft_s, options.tbt_s or profile.slo.tbt_s)
    arrivals, node = _arrivals(options), _node(options, profile)

    def simulate(nodes: int) -> Outcome:
        world = World(_spec(nodes, node, arrivals), options.seed)
        world.run(arrivals, options.seconds, drain_s=100 * options.seconds)
        moved, busiest = world.links.moved_bytes, world.busiest()
        return summary(list(world.records.values()), slo, options.seconds, moved, busiest)

    least = least_nodes(arrivals, node.machine.operating_points, options.seconds)
    made = trials(simulate, slo, least, max(least, options.most))
    sys.stdout.write(f"{profile.hardware}, {profile.base_model}: {profile.provenance} profile\n")
    sys.stdout.write("nodes  TTFT P95 s  TBT P95 ms  goodput/s  served\n")
    sys.stdout.writelines(map(_line, sorted(made, key=lambda trial: trial.nodes)))
    needed = fewest(made)
    sys.stdout.write(
        f"nodes needed: {needed if needed is not None else f'more than {max(least, options.most)}'}\n"
    )
    return 0 if needed is not None else 1


if __name__ == "__main__":
    sys.exit(_plan(_parsed(sys.argv[1:])))
