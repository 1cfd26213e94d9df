"""Count batches by what they wait for and how they ended, for metrics."""

from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager

from engine.batches.batch_records import UNFINISHED, BatchObject, BatchStatus
from engine.metrics.series import MetricSeries

_ENDS: tuple[BatchStatus, ...] = ("completed", "failed", "expired", "cancelled")


class BatchCensus:
    """The batches of one server that have not ended, and how many have since it started. Used on one event loop."""

    def __init__(self) -> None:
        self._open: dict[str, BatchObject] = {}
        self._working = Counter[str]()
        self._ended = Counter[BatchStatus]()

    def begin(self, batch: BatchObject) -> None:
        """Count a batch that is to be answered."""
        self._open[batch.id] = batch

    def turned(self, batch: BatchObject) -> None:
        """Take in another state of a batch."""
        if batch.id not in self._open:
            return
        self._open[batch.id] = batch
        if batch.status not in UNFINISHED:
            del self._open[batch.id]
            self._ended[batch.status] += 1

    @contextmanager
    def working(self, batch_id: str) -> Generator[None]:
        """Count a batch as one that runs, and not as one that waits for its turn."""
        self._working[batch_id] += 1
        try:
            yield
        finally:
            self._working -= Counter({batch_id: 1})

    def series(self, counted: Callable[[BatchObject], BatchObject]) -> tuple[MetricSeries, ...]:
        """Tell the series of this moment; `counted` returns a batch with its counts of this moment."""
        running = sum(each in self._working for each in self._open)
        states = [(("queued",), float(len(self._open) - running)), (("running",), float(running))]
        counts = [counted(each).request_counts for each in self._open.values()]
        left = sum(max(0, each.total - each.completed - each.failed) for each in counts)
        return (
            MetricSeries("loraserve_batches", "Batches that have not ended, by state.", ("state",), states),
            MetricSeries(
                "loraserve_batches_ended",
                "Batches that have ended, by how.",
                ("status",),
                [((status,), float(self._ended[status])) for status in _ENDS],
                "counter",
            ),
            MetricSeries(
                "loraserve_batch_requests_left",
                "Requests without a result, of batches whose lines are counted.",
                (),
                [((), float(left))],
            ),
        )
