"""Read what goes wrong in a simulated run, and when, from a short text."""

import numpy as np

from scheduler.sim.spec import Fault, FaultKind

_AWAY_S = 5.0  # how long a node of a storm is down
_RESTART_S = 8.0  # from one restart of a rolling one to the next


def fault_plan(text: str, nodes: int, lead_s: float, end_s: float, seed: int) -> tuple[Fault, ...]:
    """Read a plan for `nodes` nodes; its times count from `lead_s` on. A seed draws who is hit.

    It is empty for none. `crash:AT_S:FOR_S` and `slow:TIMES` hit one node, `pace:TIMES` all of them. `storm:EVERY_S`
    is of crashes, `partition:AT_S:FOR_S` cuts half of the nodes off, `coordinator:AT_S:FOR_S` takes the coordinator
    away. `rolling:AT_S` restarts every node in turn. Raises ValueError.
    """
    if not text:
        return ()
    names = [f"n{at}" for at in range(nodes)]
    rng = np.random.default_rng([seed, 17])
    hit = names[int(rng.integers(nodes))]
    kind, *given = text.split(":")
    match kind, [float(each) for each in given]:
        case "crash", [at_s, for_s]:
            return (Fault(FaultKind.CRASH, lead_s + at_s, for_s, (hit,)),)
        case "slow", [times]:
            return (Fault(FaultKind.SLOW, 0.0, end_s, (hit,), times),)
        case "pace", [times]:
            return (Fault(FaultKind.SLOW, 0.0, end_s, tuple(names), times),)
        case "storm", [every_s]:
            times = np.arange(lead_s + every_s, end_s, every_s).tolist()
            victims: list[int] = rng.integers(nodes, size=len(times)).tolist()
            return tuple(
                Fault(FaultKind.CRASH, at_s, _AWAY_S, (names[who],))
                for at_s, who in zip(times, victims, strict=True)
            )
        case "partition", [at_s, for_s]:
            return (Fault(FaultKind.PARTITION, lead_s + at_s, for_s, tuple(names[: nodes // 2])),)
        case "coordinator", [at_s, for_s]:
            return (Fault(FaultKind.COORDINATOR, lead_s + at_s, for_s),)
        case "rolling", [at_s]:
            return tuple(
                Fault(FaultKind.RESTART, lead_s + at_s + at * _RESTART_S, 0.0, (name,))
                for at, name in enumerate(names)
            )
        case _:
            raise ValueError(
                f"faults={text!r}: give crash:AT:FOR, slow:TIMES, pace:TIMES, storm:EVERY, partition:AT:FOR, "
                "coordinator:AT:FOR or rolling:AT"
            )
