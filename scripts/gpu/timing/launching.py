"""Measure what a graph replay costs: a decode step's nodes, the time of one, and the host's time."""

import time
from collections.abc import Iterator
from statistics import median

import torch

from lora.segments import NO_SEGMENTS
from scripts.gpu.backends.base import Run
from scripts.gpu.context import CheckContext
from scripts.gpu.finding import Finding, measured
from scripts.gpu.timing.timed_model import MIXES, DecodeSteps, TimedModel

_TINY_NODES = 1000


def findings(context: CheckContext) -> Iterator[Finding]:
    """Measure a step with and without adapters, and launches that do nothing."""
    yield from context.try_finding("graph node", lambda: _node(context))
    timed, width = context.once(TimedModel), context.sizes.widths[0]
    decode = DecodeSteps(timed, width)
    adapted = decode.table(timed.adapters(MIXES["all 8"](width)))
    for name, table in (("base", NO_SEGMENTS), ("rank 8", adapted)):
        run = decode.load(table)
        yield from context.try_finding(
            f"replay, {name}", lambda run=run, name=name: _replay(context, run, name)
        )
        batch = decode.batch(table)
        yield from context.try_finding(
            f"nodes, {name}",
            lambda batch=batch, name=name: measured(
                f"nodes, {name}", context.backends.nodes(lambda: decode.compute(batch)), "nodes"
            ),
        )


def _node(context: CheckContext) -> Finding:
    tiny = torch.zeros(1, device=context.device)

    def touch() -> None:
        for _ in range(_TINY_NODES):
            tiny.add_(1.0)

    took_ms = context.median_ms(context.backends.record(touch), 5)
    return measured("graph node", 1e3 * took_ms / _TINY_NODES, "us", "of a chain of launches that do nothing")


def _replay(context: CheckContext, run: Run, name: str) -> Finding:
    """Time the call on the host, the device being idle."""
    took_s: list[float] = []
    for _ in range(10):
        context.backends.synchronize()
        began_s = time.perf_counter()
        run()
        took_s.append(time.perf_counter() - began_s)
    context.backends.synchronize()
    return measured(f"replay, {name}", 1e6 * median(took_s), "us of the host")
