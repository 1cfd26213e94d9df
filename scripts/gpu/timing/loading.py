"""Time how fast an adapter comes into device memory while decode goes on, and what that costs the steps."""

import threading
import time
from collections.abc import Iterator
from statistics import median

import torch

from scripts.gpu.context import CheckContext
from scripts.gpu.finding import Finding, measured
from scripts.gpu.timing.timed_model import MIXES, DecodeSteps, TimedModel

_RANK = 64
_TURNS = 20


def findings(context: CheckContext) -> Iterator[Finding]:
    """Time the copy beside decode, and the step beside the copy."""
    timed, width = context.once(TimedModel), context.sizes.widths[0]
    decode = DecodeSteps(timed, width)
    ranks = MIXES["all 8"](width)
    run = decode.load(decode.table(timed.adapters(ranks)))
    writer, layout = context.backends.page_writer(), timed.layout(_RANK)
    pages = timed.arena[-layout.nbytes :]
    staged = writer.staging_buffer(pages, layout)
    staged.copy_(torch.randint(0, 60, (layout.nbytes,), dtype=torch.uint8))  # bytes that are finite numbers

    def copy() -> None:
        pages.copy_(staged, non_blocking=True)

    copy_ms = context.median_ms(copy, _TURNS)
    yield measured(
        "bare copy", layout.nbytes / copy_ms / 1e6, "GB/s", "from pinned memory, nothing else running"
    )
    quiet_ms = context.median_ms(run, _TURNS)
    rates: list[float] = []
    over = threading.Event()

    def load() -> None:
        while not over.is_set():
            began_s = time.perf_counter()
            writer.write(pages, staged, layout, "loaded")
            rates.append(layout.nbytes / (time.perf_counter() - began_s))

    loader = threading.Thread(target=load)
    loader.start()
    try:
        times_ms = [ms for _ in range(4) for ms in context.backends.times_ms(run, _TURNS)]
    finally:
        over.set()
        loader.join()
    note = f"{layout.nbytes / 1e6:.0f} MB, {len(rates)} loads"
    yield measured("load beside decode", median(rates) / 1e9, "GB/s", note)
    yield measured("step, nothing loading", quiet_ms, "ms", f"{width} sequences of rank 8")
    yield measured("step, loading", median(times_ms), "ms", slowest_ms=max(times_ms))
    began_s = time.perf_counter()
    writer.staging_buffer(pages, layout)
    yield measured("landing", 1e3 * (time.perf_counter() - began_s), "ms", "pinned memory for one load")
