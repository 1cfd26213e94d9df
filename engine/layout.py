"""Layout: where each slice of a plan lies in the batch, as arrays on the host. Knows no tensor and no device.

The host's work per step must stay far below a device's, so a plan that goes on with the sequences of the one
before, a token each, is laid out from that one's arrays in a few vector operations.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from scheduler.plan import PENDING, SequenceKey, Slice, StepPlan

Integers = NDArray[np.int64]

_keys, _starts, _tables = attrgetter("key"), attrgetter("start"), attrgetter("block_table")


@dataclass(frozen=True, slots=True)
class Run:
    """Batch rows `start:stop` that run under one adapter (by digest; "" is the base)."""

    start: int
    stop: int
    digest: str


@dataclass(frozen=True, slots=True)
class Layout:
    """A plan's slices in batch order: the base's first, then each adapter's together, so that its GEMMs run once.

    `slices` are the plan's in that order, and `places` [S] says where each stands in the plan. token_ids,
    positions, slots: [T]; a token id may be PENDING. query_lens, context_lens: [S], as in ForwardBatch.
    tables: [S, widest], padded with 0. logit_rows: [L], the rows whose logits are wanted: of each slice one for
    each prompt token whose log-probability is wanted (there are `scored` [S]), then one to sample from, if it
    samples. pending: [P] batch rows whose token is still to be drawn, and `sources` [P] which draw of the layout
    before that is.
    """

    slices: tuple[Slice, ...]
    places: Integers
    runs: tuple[Run, ...]
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

    @property
    def draws(self) -> tuple[int, ...]:
        """Which of `slices` sample, in their order."""
        return tuple(i for i, part in enumerate(self.slices) if part.samples)


@dataclass(slots=True)
class _Last:
    """The latest layout, and what tells quickly whether a plan goes on from it."""

    layout: Layout
    keys: list[SequenceKey]  # in the plan's order
    block_tables: list[tuple[int, ...]]  # in batch order
    draws: dict[SequenceKey, int]
    steady: bool  # all its slices are one row that samples


@dataclass(slots=True)
class LayOut:
    """Lays plans out, one after another in the order in which they are launched."""

    block_size: int
    _last: _Last | None = field(default=None, init=False)

    def __call__(self, plan: StepPlan) -> Layout:
        """The plan's layout. A PENDING token is one that the plan before draws."""
        return self._continued(plan) or self._afresh(plan)

    def _continued(self, plan: StepPlan) -> Layout | None:
        """The layout of a plan that runs one more token of each of the last one's sequences; None of any other."""
        last = self._last
        if last is None or not last.steady or list(map(_keys, plan.slices)) != last.keys:
            return None
        before = last.layout
        slices = tuple(map(plan.slices.__getitem__, before.places.tolist()))
        positions = before.positions + 1
        if list(map(_starts, slices)) != positions.tolist() or not _steady(slices):
            return None
        token_ids = np.fromiter((part.token_ids[0] for part in slices), np.int64, len(slices))
        tables = self._grown(last, slices)
        pending = np.flatnonzero(token_ids == PENDING)
        row = np.arange(len(slices))
        last.layout = Layout(
            slices,
            before.places,
            before.runs,
            token_ids,
            positions,
            _slots(tables, row, positions, self.block_size),
            before.query_lens,
            before.context_lens + 1,
            tables,
            before.logit_rows,
            before.scored,
            pending,
            pending,
        )
        return last.layout

    def _grown(self, last: _Last, slices: tuple[Slice, ...]) -> Integers:
        """The last tables with the blocks that sequences have gained since."""
        tables, known = last.layout.tables, last.block_tables
        changed = [i for i, part in enumerate(slices) if part.block_table is not known[i]]
        if not changed:
            return tables
        widest = max(tables.shape[1], max(len(slices[i].block_table) for i in changed))
        grown = np.zeros((len(slices), widest), np.int64)
        grown[:, : tables.shape[1]] = tables
        for i in changed:
            known[i] = slices[i].block_table
            grown[i, : len(known[i])] = known[i]
        return grown

    def _afresh(self, plan: StepPlan) -> Layout:
        turn = {"": 0} | {ref.digest: number for number, ref in enumerate(plan.adapters, start=1)}
        places = sorted(range(len(plan.slices)), key=lambda i: turn[plan.slices[i].adapter.digest])
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
        layout = Layout(
            slices,
            np.array(places),
            tuple(_runs(slices, first_rows.tolist())),
            token_ids,
            positions,
            _slots(tables, sequence, positions, self.block_size),
            query_lens,
            starts + query_lens,
            tables,
            np.array(list(_logit_rows(slices, first_rows.tolist(), scored.tolist())), np.int64),
            scored,
            pending,
            np.array([self._draw_of(slices[sequence[row]].key) for row in pending], np.int64),
        )
        self._remember(plan, layout)
        return layout

    def _draw_of(self, key: SequenceKey) -> int:
        assert self._last is not None, "nothing is pending in the first plan"
        return self._last.draws[key]

    def _remember(self, plan: StepPlan, layout: Layout) -> None:
        self._last = _Last(
            layout,
            list(map(_keys, plan.slices)),
            list(map(_tables, layout.slices)),
            {layout.slices[i].key: draw for draw, i in enumerate(layout.draws)},
            _steady(layout.slices),
        )


def _steady(slices: tuple[Slice, ...]) -> bool:
    return all(part.samples and len(part.token_ids) == 1 and not part.prompt_logprobs for part in slices)


def _slots(tables: Integers, sequence: Integers, positions: Integers, block_size: int) -> Integers:
    return tables[sequence, positions // block_size] * block_size + positions % block_size


def _padded(block_tables: list[tuple[int, ...]]) -> Integers:
    """[S, widest], padded with block 0, which no row's context reaches."""
    tables = np.zeros((len(block_tables), max(map(len, block_tables))), np.int64)
    for row, blocks in enumerate(block_tables):
        tables[row, : len(blocks)] = blocks
    return tables


def _scored(part: Slice) -> int:
    """How many rows, from the slice's first, predict a prompt token whose log-probability is wanted."""
    if not part.prompt_logprobs:
        return 0
    return max(0, min(len(part.token_ids), len(part.request.prompt_token_ids) - 1 - part.start))


def _logit_rows(slices: tuple[Slice, ...], first_rows: list[int], scored: list[int]) -> Iterable[int]:
    for part, row, count in zip(slices, first_rows, scored, strict=True):
        yield from range(row, row + count)
        if part.samples:
            yield row + len(part.token_ids) - 1


def _runs(slices: tuple[Slice, ...], first_rows: list[int]) -> Iterable[Run]:
    start, digest = 0, ""
    for part, row in zip(slices, first_rows, strict=True):
        if part.adapter.digest != digest:
            if row > start:
                yield Run(start, row, digest)
            start, digest = row, part.adapter.digest
    yield Run(start, first_rows[-1] + len(slices[-1].token_ids), digest)
