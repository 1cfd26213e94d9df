"""Follower: replayed decode steps on a device other than the first, which draws the tokens and sends what to run."""

from engine.lane import DecodeParts, Lane, Record
from model.batch import ForwardBatch


class Follower:
    """Graphs that are recorded and replayed when the first device's are: both go by the same steps, so that they meet
    in every sum. Steps have at most `blocks` blocks a sequence."""

    def __init__(self, parts: DecodeParts, blocks: int, record: Record) -> None:
        self._parts, self._blocks, self._record = parts, blocks, record
        self._lanes: dict[int, Lane] = {}

    def run(self, batch: ForwardBatch) -> None:
        """Launch the step: every row of the first device's, the tables of those that are somebody's."""
        width = len(batch.token_ids)
        if width not in self._lanes:
            self._lanes[width] = Lane(self._parts, width, self._blocks)
        lane = self._lanes[width]
        for kept, sent in zip(lane.inputs, (batch.token_ids, batch.positions, batch.slots), strict=True):
            kept.copy_(sent)
        count, columns = batch.block_tables.shape
        lane.tables[:count, :columns].copy_(batch.block_tables)

        def compute(loaded: ForwardBatch) -> None:
            lane.forward(loaded)

        lane.launch(lane.batch(batch.context_lens, batch.segments), compute, self._record)
