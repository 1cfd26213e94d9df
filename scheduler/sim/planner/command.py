"""`python -m scheduler.sim plan`: trace, adapters and SLO in; nodes needed, placement and cost out. Nothing
else in the simulator knows files or the terminal."""

import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import replace
from math import ceil, floor
from pathlib import Path
from typing import NoReturn

import numpy as np
from tqdm import tqdm

from scheduler.cluster.cost.model import Kernel
from scheduler.cluster.cost.profile import InvalidProfile, Profile, Slo, from_json
from scheduler.cluster.policies import OURS
from scheduler.sim.ablations.named_policies import BASELINES, UnknownPolicy, named
from scheduler.sim.planner.chart import CannotDraw, check_drawable, draw
from scheduler.sim.planner.files import InvalidOption, check_writable, read, write
from scheduler.sim.planner.report import as_json, lines
from scheduler.sim.planner.search import Need, PlanQuestion, Watch, needed
from scheduler.sim.replay import Hardware, Workload, fitted
from scheduler.sim.workload.adapters import Catalogue, InvalidCatalogue, catalogue, rank_mix, read_catalogue
from scheduler.sim.workload.popularity import InvalidLaw, Known, Popularity, assigned, over, popularity
from scheduler.sim.workload.trace import Call, busiest_s, read_trace

_PROFILES = Path(__file__).parents[2] / "cluster" / "profiles"
_TRACE = "CSV with TIMESTAMP, ContextTokens, GeneratedTokens"
_LIST = "a CSV, JSON or text file of name,rank[,bytes][,share]"
_TIMES = 4
_MOST_ADAPTERS, _MOST_DIGITS, _MOST_GIB, _MOST_SEEDS = 100_000, 12, 1 << 20, 100
_WARM_S = 60.0  # of traffic before what is counted, so that the first placement has seen some demand


_BAD_INPUT = (
    CannotDraw,
    InvalidCatalogue,
    InvalidLaw,
    InvalidOption,
    InvalidProfile,
    UnknownPolicy,
)


class _PlannerArguments(ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _parser() -> ArgumentParser:
    parser = _PlannerArguments(
        prog="python -m scheduler.sim", description="Simulate a cluster before buying it."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser(
        "plan",
        help="how many nodes a workload needs, which placement, what it costs, what other policies would need",
        description="Node hours, the cost, are the nodes needed times the hours that the whole trace lasts at "
        "--speedup, however little of it is simulated.",
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
    asked = plan.add_argument_group("what is asked")
    asked.add_argument("--trace", type=Path, required=True, help=_TRACE)
    asked.add_argument("--adapters", required=True, help=f"how many, or {_LIST}")
    asked.add_argument(
        "--ranks",
        metavar="MIX",
        help="equal (8 to 128), skewed, shifting, or rank:part,rank:part,...; equal unless given",
    )
    asked.add_argument(
        "--popularity",
        metavar="LAW",
        help="uniform, zipf[:EXPONENT], power[:ALPHA], diurnal[:ALPHA] or flash[:ALPHA]; power:0.3 unless given",
    )
    asked.add_argument("--slo-ttft", type=float, required=True, metavar="S", help="P95 bound, seconds")
    asked.add_argument("--slo-tbt", type=float, required=True, metavar="S", help="P95 bound, seconds")
    asked.add_argument("--speedup", type=float, default=1.0, help="times as fast that the requests come")
    asked.add_argument(
        "--seconds", type=float, default=600.0, help="simulate the busiest so many of the trace; 0 for all"
    )
    nodes = plan.add_argument_group("which nodes")
    nodes.add_argument("--profile", default="h100_llama8b", help="a node's profile: its name, or a JSON file")
    nodes.add_argument("--kernel", choices=[kernel.value for kernel in Kernel], default="exact")
    nodes.add_argument("--adapter-gib", type=float, default=16.0, help="memory for adapters on each node")
    nodes.add_argument(
        "--most",
        type=int,
        default=64,
        help="nodes to try at most (of other policies, four times the first's)",
    )
    answer = plan.add_argument_group("how to answer")
    answer.add_argument(
        "--policies", default=",".join(("ours", *BASELINES)), help="the first one's placement is shown"
    )
    answer.add_argument("--seed", type=int, default=0)
    answer.add_argument(
        "--seeds", type=int, default=1, help="nodes must be enough under so many seeds, from --seed on"
    )
    answer.add_argument("--out", type=Path, metavar="FILE.json", help="write the whole placement here")
    answer.add_argument("--figure", type=Path, metavar="FILE.png", help="draw the answer here")
    return parser


def _positive(name: str, value: float, most: float = float("inf")) -> float:
    if not 0 < value < float("inf"):
        raise InvalidOption(f"--{name} {value:g}: give a number above 0")
    if value > most:
        raise InvalidOption(f"--{name} {value:g}: give at most {most}")
    return value


def _seconds(value: float) -> float:
    if not 0 <= value < float("inf"):
        raise InvalidOption(f"--seconds {value:g}: give 0 or more; 0 simulates the whole trace")
    return value


def _profile(name: str) -> Profile:
    """Read a shipped profile by name, or any by path."""
    shipped = sorted(path.stem for path in _PROFILES.glob("*.json"))
    if name in shipped:
        return from_json((_PROFILES / f"{name}.json").read_text())
    if not Path(name).is_file():
        raise InvalidProfile(f"--profile {name!r} is neither a file nor one of {', '.join(shipped)}")
    return read("--profile", Path(name), "give the JSON of a profile", from_json)


def _catalogue(options: Namespace) -> Catalogue:
    """Draw the adapters up or read them; a list that says it all leaves nothing to --ranks and --popularity."""
    if options.adapters.lstrip("-").isdigit():
        if len(options.adapters) > _MOST_DIGITS:
            raise InvalidOption(
                f"--adapters {options.adapters[:_MOST_DIGITS]}...: give at most {_MOST_ADAPTERS}"
            )
        count = int(_positive("adapters", int(options.adapters), _MOST_ADAPTERS))
        return Catalogue(catalogue(count, rank_mix(options.ranks or "equal")))
    remedy = f"give how many adapters there are, or {_LIST}"
    known = read("--adapters", Path(options.adapters), remedy, read_catalogue)
    if options.ranks is not None:
        raise InvalidOption(f"--ranks {options.ranks}: {options.adapters} lists ranks; leave --ranks out")
    if known.shares is not None and options.popularity is not None:
        raise InvalidOption(
            f"--popularity {options.popularity}: {options.adapters} lists shares; leave one of them out"
        )
    return known


def _law(options: Namespace, known: Catalogue) -> Popularity:
    if known.shares is not None:
        return Known(known.shares)
    return over(popularity(options.popularity or "power:0.3"), rank_mix(options.ranks or "equal"))


def _busiest(trace: Sequence[Call], seconds: float) -> list[Call]:
    """Return the calls of the `seconds` in which most is asked for.

    Before them come those of the `_WARM_S` before, or silence as far as there are none.
    """
    start_s = busiest_s(trace, seconds) - _WARM_S
    end_s = start_s + _WARM_S + seconds
    return [call.at(call.arrival_s - start_s) for call in trace if start_s <= call.arrival_s < end_s]


def _traffic(known: Catalogue, calls: Sequence[Call], law: Popularity, seconds: float, seed: int) -> Workload:
    """Draw who asks for what; where shares are not known, which adapters are popular too."""
    rng = np.random.default_rng(seed)
    order = range(len(known.adapters)) if known.shares else rng.permutation(len(known.adapters)).tolist()
    arrivals = assigned(calls, [known.adapters[at] for at in order], law, rng)
    return Workload(arrivals, known.adapters, seconds + _WARM_S, warm_s=_WARM_S)


def _check_room(known: Catalogue, gib: float) -> None:
    largest = max(known.adapters, key=lambda ref: ref.nbytes)
    if largest.nbytes > int(gib * 2**30):
        raise InvalidOption(
            f"--adapter-gib {gib:g}: adapter {largest.name!r} of rank {largest.rank} takes "
            f"{ceil(largest.nbytes / 2**30 * 1000) / 1000:.3f} GiB and fits on no node: "
            "give at least that much, or leave it out"
        )


def _check_slo(hardware: Hardware) -> None:
    """Refuse, before the work, an SLO that no node can meet."""
    slo, model = hardware.profile.slo, hardware.profile.model(hardware.kernel)
    try:
        hardware.node(OURS.residency)
    except InvalidProfile as error:
        raise InvalidOption(
            f"--slo-ttft {slo.ttft_s:g} --slo-tbt {slo.tbt_s:g}: no node meets this, as even a step that does "
            f"nothing takes {model.base_s:.4f} s, and a first token two steps: loosen the SLO or take a faster node"
        ) from error


def _hardware(profile: Profile, kernel: str, adapter_bytes: int) -> Hardware:
    """Make nodes that have `adapter_bytes` beside the K/V of their profile, and share the two."""
    limits = profile.limits
    memory_bytes = limits.kv_tokens * limits.kv_token_bytes + adapter_bytes
    return Hardware(profile, Kernel(kernel), memory_bytes, adapter_bytes=adapter_bytes)


def _question(options: Namespace) -> PlanQuestion:
    profile, known = _profile(options.profile), _catalogue(options)
    law = _law(options, known)
    slo = Slo(_positive("slo-ttft", options.slo_ttft), _positive("slo-tbt", options.slo_tbt))
    trace = read("--trace", options.trace, f"give a {_TRACE}", read_trace)
    speedup = _positive("speedup", options.speedup)
    trace = tuple(call.at(call.arrival_s / speedup) for call in trace)
    whole_s = floor(trace[-1].arrival_s) + 1.0
    seconds = min(_seconds(options.seconds) or whole_s, whole_s)
    if options.seed < 0:
        raise InvalidOption(f"--seed {options.seed}: give 0 or more")
    busiest, seeds = _busiest(trace, seconds), int(_positive("seeds", options.seeds, _MOST_SEEDS))
    traffic, *further = (_traffic(known, busiest, law, seconds, options.seed + at) for at in range(seeds))
    adapter_bytes = int(_positive("adapter-gib", options.adapter_gib, _MOST_GIB) * 2**30)
    _check_room(known, options.adapter_gib)
    hardware = fitted(_hardware(replace(profile, slo=slo), options.kernel, adapter_bytes), traffic)
    _check_slo(hardware)
    most = int(_positive("most", options.most))
    return PlanQuestion(hardware, traffic, whole_s / 3600, most, options.seed, tuple(further))


def _needs(question: PlanQuestion, names: Sequence[str]) -> list[Need]:
    policies = [named(name) for name in names]
    needs: list[Need] = []
    with tqdm(total=len(policies), unit="policy", file=sys.stderr, mininterval=0.5) as bar:
        for policy in policies:
            limited = replace(question, most=_most(question, needs))
            needs.append(needed(limited, policy, _watch(bar)))
            bar.update()
    return needs


def _most(question: PlanQuestion, needs: Sequence[Need]) -> int:
    """Ask of other policies no more than whether they need `_TIMES` as many nodes as the first."""
    return min(question.most, _TIMES * needs[0].best.nodes) if needs else question.most


def _watch(bar: "tqdm[NoReturn]") -> Watch:
    def watch(policy: str, nodes: int, part: float) -> None:
        bar.set_description_str(f"{policy}, {nodes} nodes, {100 * part:.0f} %", refresh=False)
        bar.update(0)

    return watch


def _check_answers(options: Namespace) -> None:
    """Refuse, before the work, what would keep an answer from being written."""
    if options.out:
        check_writable("--out", options.out)
    if options.figure:
        check_writable("--figure", options.figure)
        check_drawable(options.figure)


def _plan(options: Namespace) -> int:
    _check_answers(options)
    question = _question(options)
    needs = _needs(question, options.policies.split(","))
    sys.stdout.writelines(f"{line}\n" for line in lines(question, needs))
    sys.stdout.flush()  # the table stands, whatever becomes of the files
    if options.out:
        write("--out", options.out, lambda path: path.write_text(as_json(question, needs[0])))
    if options.figure:
        write("--figure", options.figure, lambda path: draw(question, needs, path))
    return 0 if needs[0].fewest else 1


def main(arguments: Sequence[str]) -> int:
    """Run the command. Exit status: 0 with an answer, 1 if more nodes are needed than were tried, 2 for bad
    input."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return _plan(options)
    except _BAD_INPUT as error:
        parser.error(str(error))
