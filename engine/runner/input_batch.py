"""Arrange a plan's slices as one batch: arrays on the host that say where each row belongs. Knows no tensor.

The host's work per step must stay far below a device's. So a plan that continues the sequences of the one before, a
token each, is arranged from that one's arrays in a few vector operations.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter, is_

import numpy as np
from numpy.typing import NDArray

from scheduler.plan import PENDING, SequenceKey, Slice, StepPlan

Integers = NDArray[np.int64]

_keys, _starts, _tables = attrgetter("key"), attrgetter("start"), attrgetter("block_table")


@dataclass(frozen=True, slots=True)
class AdapterRun:
    """Batch rows `start:stop` that run under one adapter (by digest; "" is the base)."""

    start: int
    stop: int
    digest: str


@dataclass(frozen=True, slots=True)
class InputBatch:
    """A plan's slices in batch order: the base's first, then each adapter's together, so that its GEMMs run once.

    `slices` are the plan's in that order, and `places` [S] says where each stands in the plan. `sampling` says
    which of them sample. `runs` are the rows of each adapter.

    token_ids, positions, slots: [T]; a token id may be PENDING. query_lens, context_lens: [S], as in ForwardBatch.
    tables: [S, widest], padded with 0. logit_rows: [L], the rows whose logits are wanted. Of each slice these are
    `scored` [S] rows, whose prompt token's log-probability is wanted, then one to sample from, if it samples.
    pending: [P] rows whose token is still to be drawn, and `sources` [P] which draw of the batch before that is.

    `continues` says that the rows are those of the batch before, each sequence one token on. A pending token's
    source is then its own row.
    """

    slices: tuple[Slice, ...]
    places: Integers
    sampling: tuple[int, ...]
    runs: tuple[AdapterRun, ...]
    token_ids: Integers
    positions: Integers
    slots: Integers
    query_lens: Integers
    context_lens: Integers
    tables: Integers
    logit_rows: Integers
    scored: Integers
    pending: Integers
    sources: Integers
    continues: bool

    @property
    def prompt_lens(self) -> tuple[int, ...]:
        """Tokens of each slice's whole prompt, as in ForwardBatch."""
        return tuple(len(part.request.prompt_token_ids) for part in self.slices)

    @property
    def decodes(self) -> bool:
        """Whether each slice is one row that samples."""
        return len(self.token_ids) == len(self.slices) == len(self.logit_rows) == len(self.sampling)


class _LastBatch:
    """The latest batch, and what shows quickly whether and how a plan continues it."""

    def __init__(self, plan: StepPlan, batch: InputBatch) -> None:
        self.batch = batch
        self.keys = list(map(_keys, plan.slices))
        self.places: list[int] = batch.places.tolist()
        self.draws = {batch.slices[i].key: draw for draw, i in enumerate(batch.sampling)}
        self.rows = np.arange(len(self.keys))
        self.decodes = batch.decodes
        self._block_tables = tuple(map(_tables, plan.slices))
        self._row_of: list[int] = np.argsort(batch.places).tolist()

    def grow_tables(self, block_tables: tuple[tuple[int, ...], ...]) -> Integers:
        """Return the batch's tables with the blocks that sequences have gained; block_tables in the plan's order."""
        tables = self.batch.tables
        changed = [i for i, same in enumerate(map(is_, block_tables, self._block_tables)) if not same]
        self._block_tables = block_tables
        if not changed:
            return tables
        widest = max(tables.shape[1], max(len(block_tables[i]) for i in changed))
        grown = np.zeros((len(block_tables), widest), np.int64)
        grown[:, : tables.shape[1]] = tables
        for i in changed:
            grown[self._row_of[i], : len(block_tables[i])] = block_tables[i]
        return grown


@dataclass(slots=True)
class InputBatchBuilder:
    """Makes the batches of plans, one after another in the order in which they are launched."""

    block_size: int
    _last: _LastBatch | None = field(default=None, init=False)

    def build(self, plan: StepPlan) -> InputBatch:
        """Make the plan's batch. A PENDING token is one that the plan before draws."""
        return self._continue_last(plan) or self._build_new(plan)

    def _continue_last(self, plan: StepPlan) -> InputBatch | None:
        """Make the batch of a plan that runs one more token of each of the last one's sequences; None of others."""
        last = self._last
        if last is None or not last.decodes or len(plan.slices) != len(last.keys):
            return None
        keys, _, tokens, starts, block_tables, samples, _, _, scored = zip(*plan.slices, strict=True)
        before = last.batch
        positions, places = before.positions + 1, before.places
        if list(keys) != last.keys or not np.array_equal(np.array(starts)[places], positions):
            return None
        if sum(map(len, tokens)) != len(keys) or not all(samples) or any(scored):
            return None
        token_ids = np.array([token_id for (token_id,) in tokens])[places]
        tables = last.grow_tables(block_tables)
        pending = np.flatnonzero(token_ids == PENDING)
        last.batch = InputBatch(
            slices=tuple(map(plan.slices.__getitem__, last.places)),
            places=places,
            sampling=before.sampling,
            runs=before.runs,
            token_ids=token_ids,
            positions=positions,
            slots=_slots(tables, last.rows, positions, self.block_size),
            query_lens=before.query_lens,
            context_lens=before.context_lens + 1,
            tables=tables,
            logit_rows=before.logit_rows,
            scored=before.scored,
            pending=pending,
            sources=pending,
            continues=True,
        )
        return last.batch

    def _build_new(self, plan: StepPlan) -> InputBatch:
        order = {"": 0} | {ref.digest: number for number, ref in enumerate(plan.adapters, start=1)}
        places = sorted(range(len(plan.slices)), key=lambda i: order[plan.slices[i].adapter.digest])
        slices = tuple(plan.slices[i] for i in places)
        starts = np.array(list(map(_starts, slices)))
        query_lens = np.array([len(part.token_ids) for part in slices])
        first_rows = np.cumsum(query_lens) - query_lens
        sequence = np.repeat(np.arange(len(slices)), query_lens)
        positions = np.arange(len(sequence)) - (first_rows - starts)[sequence]
        token_ids = np.array(list(chain.from_iterable(part.token_ids for part in slices)))
        tables = _padded(list(map(_tables, slices)))
        scored = np.array([_scored(part) for part in slices])
        pending = np.flatnonzero(token_ids == PENDING)
        batch = InputBatch(
            slices=slices,
            places=np.array(places),
            sampling=tuple(i for i, part in enumerate(slices) if part.samples),
            runs=tuple(_runs(slices, first_rows.tolist())),
            token_ids=token_ids,
            positions=positions,
            slots=_slots(tables, sequence, positions, self.block_size),
            query_lens=query_lens,
            context_lens=starts + query_lens,
            tables=tables,
            logit_rows=np.array(list(_logit_rows(slices, first_rows.tolist(), scored.tolist())), np.int64),
            scored=scored,
            pending=pending,
            sources=np.array([self._draw_of(slices[sequence[row]].key) for row in pending], np.int64),
            continues=False,
        )
        self._last = _LastBatch(plan, batch)
        return batch

    def _draw_of(self, key: SequenceKey) -> int:
        assert self._last is not None, "nothing is pending in the first plan"
        return self._last.draws[key]


def _slots(tables: Integers, sequence: Integers, positions: Integers, block_size: int) -> Integers:
    return tables[sequence, positions // block_size] * block_size + positions % block_size


def _padded(block_tables: list[tuple[int, ...]]) -> Integers:
    """Make [S, widest], padded with block 0, which no row's context reaches."""
    tables = np.zeros((len(block_tables), max(map(len, block_tables))), np.int64)
    for row, blocks in enumerate(block_tables):
        tables[row, : len(blocks)] = blocks
    return tables


def _scored(part: Slice) -> int:
    """Count the rows, from the slice's first, that predict a prompt token whose log-probability is wanted."""
    if not part.prompt_logprobs:
        return 0
    return max(0, min(len(part.token_ids), len(part.request.prompt_token_ids) - 1 - part.start))


def _logit_rows(slices: tuple[Slice, ...], first_rows: list[int], scored: list[int]) -> Iterable[int]:
    for part, row, count in zip(slices, first_rows, scored, strict=True):
        yield from range(row, row + count)
        if part.samples:
            yield row + len(part.token_ids) - 1


def _runs(slices: tuple[Slice, ...], first_rows: list[int]) -> Iterable[AdapterRun]:
    start, digest = 0, ""
    for part, row in zip(slices, first_rows, strict=True):
        if part.adapter.digest != digest:
            if row > start:
                yield AdapterRun(start, row, digest)
            start, digest = row, part.adapter.digest
    yield AdapterRun(start, first_rows[-1] + len(slices[-1].token_ids), digest)
