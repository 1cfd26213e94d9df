"""The capacity planner's answer as text and as JSON. The same answer gives the same bytes."""

import json
from collections.abc import Iterator, Mapping, Sequence

from lora.adapter import AdapterRef
from scheduler.cluster.state import RoutingTable
from scheduler.sim.planner.search import Need, PlanQuestion, Trial
from scheduler.sim.replay import Replay

_GIB = 2**30
_GIVEN_UP = "  ".join("-".rjust(width) for width in (10, 10, 8, 10, 6, 5, 9))


def lines(question: PlanQuestion, needs: Sequence[Need]) -> Iterator[str]:
    """Return the tables; `needs` begins with the policy that the placement is of."""
    chosen = needs[0]
    yield from _heading(question)
    yield ""
    yield from _policies(question, needs)
    yield ""
    fewest = chosen.fewest
    if fewest is None:
        yield f"nodes needed: more than {chosen.best.nodes} (the most tried) under {chosen.policy.name!r}"
        return
    yield f"placement of {chosen.policy.name!r} on {_counted(fewest.nodes, 'node')}, when the traffic ended"
    yield from _tiers(fewest.replay)
    yield ""
    yield from _nodes(fewest.replay)
    yield ""
    yield f"nodes needed: {fewest.nodes}"


def as_json(question: PlanQuestion, need: Need) -> str:
    """Return the placement in full, adapter → node → part, with what it was made for."""
    trial = need.best
    slo = question.slo
    shares = {
        ref.name: {"rank": ref.rank, "bytes": ref.nbytes, "nodes": {s.node: s.part for s in parts}}
        for ref, parts in trial.replay.table.shares.items()
    }
    answer = {
        "policy": need.policy.name,
        "nodes": trial.nodes,
        "enough": trial.enough,
        "slo": {"ttft_s": slo.ttft_s, "tbt_s": slo.tbt_s},
        "seed": question.seed,
        "placement": shares,
    }
    return json.dumps(answer, indent=2) + "\n"


def _heading(question: PlanQuestion) -> Iterator[str]:
    profile, traffic, slo = question.hardware.profile, question.traffic, question.slo
    kernel = question.hardware.kernel.value
    counted = sum(each.call.arrival_s >= traffic.warm_s for each in traffic.arrivals)
    ranks = sorted(ref.rank for ref in traffic.adapters)
    gib = sum(ref.nbytes for ref in traffic.adapters) / _GIB
    yield f"{profile.hardware}, {profile.base_model}: {profile.provenance} profile, {kernel} kernels"
    yield (
        f"{_counted(counted, 'request')} in {traffic.seconds - traffic.warm_s:.0f} s, "
        f"{_counted(len(ranks), 'adapter')} of rank {ranks[0]} to {ranks[-1]}, {gib:.1f} GiB in all"
    )
    yield f"SLO: P95 of TTFT {slo.ttft_s:g} s, of TBT {slo.tbt_s:g} s"


def _policies(question: PlanQuestion, needs: Sequence[Need]) -> Iterator[str]:
    width = max(len(need.policy.name) for need in needs)
    everything = sum(ref.nbytes for ref in question.traffic.adapters)
    yield (
        f"{'policy':{width}}  nodes  node hours  TTFT P95 s  TBT P95 ms  in SLO/s  "
        f"GiB a node  of all  pulls  GiB moved"
    )
    for need in needs:
        trial = need.best
        mark = "" if trial.enough else ">"
        nodes, hours = f"{mark}{trial.nodes}", f"{mark}{trial.nodes * question.hours:.2f}"
        figures = _figures(trial, everything) if trial.replay.finished else _GIVEN_UP
        yield f"{need.policy.name:{width}}  {nodes:>5}  {hours:>10}  {figures}"
    if not all(need.best.replay.finished for need in needs):
        yield "-: given up early, with too many requests late"


def _figures(trial: Trial, everything: int) -> str:
    """Return the figures of a run that was finished; `everything` is the bytes of all adapters."""
    outcome, last = trial.replay.outcome, trial.replay.last
    held = last.kept_bytes / trial.nodes
    return (
        f"{outcome.ttft_p95_s:10.3f}  {1e3 * outcome.tbt_p95_s:10.2f}  {outcome.goodput:8.2f}  "
        f"{held / _GIB:10.2f}  {100 * held / everything:5.0f}%  {last.pulls:5d}  {last.moved_bytes / _GIB:9.2f}"
    )


def _tiers(done: Replay) -> Iterator[str]:
    """Return, for each rank, adapters, their copies, and the nodes that take them."""
    yield " rank  adapters  copies  nodes"
    by_rank: dict[int, list[AdapterRef]] = {}
    for ref in done.table.shares:
        by_rank.setdefault(ref.rank, []).append(ref)
    for rank, refs in sorted(by_rank.items()):
        holders = [share.node for ref in refs for share in done.table.shares[ref]]
        names = " ".join(name for name in done.busy if name in holders)
        yield f"{rank:5d}  {len(refs):8d}  {len(holders):6d}  {names}"


def _nodes(done: Replay) -> Iterator[str]:
    """Return, for each node, how busy it was, bytes, and adapters by rank."""
    yield "node   busy    GiB  adapters by rank"
    for name, busy in done.busy.items():
        refs = _on(done.table, name)
        counts: dict[int, int] = {}
        for ref in sorted(refs, key=lambda ref: ref.rank):
            counts[ref.rank] = counts.get(ref.rank, 0) + 1
        nbytes = sum(ref.nbytes for ref in refs)
        yield f"{name:5}  {100 * busy:3.0f}%  {nbytes / _GIB:5.1f}  {_ranks(counts)}"


def _on(table: RoutingTable, node: str) -> list[AdapterRef]:
    return [ref for ref, shares in table.shares.items() if any(share.node == node for share in shares)]


def _ranks(counts: Mapping[int, int]) -> str:
    return ", ".join(f"{count} of {rank}" for rank, count in counts.items())


def _counted(count: int, thing: str) -> str:
    return f"{count} {thing}{'' if count == 1 else 's'}"
