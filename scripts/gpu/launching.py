"""What a replay costs: the nodes of a decode step, each node's share of time, and the host's."""

import time
from collections.abc import Iterator
from statistics import median

import torch

from lora.segments import NO_SEGMENTS
from scripts.gpu.backends import Run
from scripts.gpu.row import Row, measured
from scripts.gpu.stand import Stand
from scripts.gpu.world import MIXES, Decode, World

_TINY_NODES = 1000


def rows(stand: Stand) -> Iterator[Row]:
    """Of a step with and without adapters, and of launches that do nothing."""
    yield from stand.try_row("graph node", lambda: _node(stand))
    world, width = stand.once(World), stand.sizes.widths[0]
    decode = Decode(world, width)
    adapted = decode.table(world.adapters(MIXES["all 8"](width)))
    for name, table in (("base", NO_SEGMENTS), ("rank 8", adapted)):
        run = decode.load(table)
        yield from stand.try_row(f"replay, {name}", lambda run=run, name=name: _replay(stand, run, name))
        batch = decode.batch(table)
        yield from stand.try_row(
            f"nodes, {name}",
            lambda batch=batch, name=name: measured(
                f"nodes, {name}", stand.backends.nodes(lambda: decode.compute(batch)), "nodes"
            ),
        )


def _node(stand: Stand) -> Row:
    tiny = torch.zeros(1, device=stand.device)

    def touch() -> None:
        for _ in range(_TINY_NODES):
            tiny.add_(1.0)

    took_ms = stand.median_ms(stand.backends.record(touch), 5)
    return measured("graph node", 1e3 * took_ms / _TINY_NODES, "us", "of a chain of launches that do nothing")


def _replay(stand: Stand, run: Run, name: str) -> Row:
    """The host's time in the call, the device being idle."""
    took_s = []
    for _ in range(10):
        stand.backends.synchronize()
        began_s = time.perf_counter()
        run()
        took_s.append(time.perf_counter() - began_s)
    stand.backends.synchronize()
    return measured(f"replay, {name}", 1e6 * median(took_s), "us of the host")
