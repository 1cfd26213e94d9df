"""A plan's rows are where its slices say, and the same whether it continues the last one or is built anew."""

from dataclasses import fields

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.runner.input_batch import AdapterRun, InputBatch, InputBatchBuilder, Integers
from lora.adapter import BASE
from scheduler.limits import StepLimits
from scheduler.plan import PENDING, StepPlan
from scheduler.request import SamplingParams
from tests.chance import examples
from tests.scheduler.rig import ADAPTERS, Rig, request

BLOCK_SIZE = 4


def check(plan: StepPlan, batch: InputBatch, before: InputBatch | None) -> None:
    """Row by row, against what each slice says of itself."""
    assert [plan.slices[place] for place in batch.places] == list(batch.slices)
    assert sorted(batch.places) == list(range(len(plan.slices)))
    digests = [digest for run in batch.runs for digest in [run.digest] * (run.stop - run.start)]
    row = 0
    logit_rows: list[int] = []
    for i, part in enumerate(batch.slices):
        count = len(part.token_ids)
        positions = range(part.start, part.start + count)
        rows = slice(row, row + count)
        assert tuple(batch.token_ids[rows]) == part.token_ids
        assert list(batch.positions[rows]) == list(positions)
        blocks = [part.block_table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in positions]
        assert list(batch.slots[rows]) == blocks
        assert set(digests[rows]) == {part.adapter.digest}
        assert (batch.query_lens[i], batch.context_lens[i]) == (count, part.start + count)
        assert tuple(batch.tables[i, : len(part.block_table)]) == part.block_table
        logit_rows += range(row, row + int(batch.scored[i]))
        logit_rows += [row + count - 1] * part.samples
        row += count
    assert list(batch.logit_rows) == logit_rows
    assert len({run.digest for run in batch.runs}) == len(batch.runs), "an adapter's rows are adjacent"
    check_pending(batch, before)


def check_pending(batch: InputBatch, before: InputBatch | None) -> None:
    assert list(batch.pending) == list(np.flatnonzero(batch.token_ids == PENDING))
    sequence = np.repeat(np.arange(len(batch.slices)), batch.query_lens)
    for row, source in zip(batch.pending, batch.sources, strict=True):
        assert before is not None
        assert before.slices[before.sampling[source]].key == batch.slices[sequence[row]].key


limits = st.builds(
    StepLimits, st.integers(1, 6), st.integers(1, 20), st.just(40), adapter_patience_s=st.just(1e9)
)
params = st.builds(
    SamplingParams,
    n=st.sampled_from((1, 1, 2)),
    max_tokens=st.integers(1, 14),
    presence_penalty=st.sampled_from((0.0, 0.0, 1.0)),
    prompt_logprobs=st.sampled_from((None, None, 0)),
    seed=st.integers(0, 3),
)
asked = st.lists(
    st.tuples(
        st.integers(0, 3),  # steps before it comes
        st.lists(st.integers(0, 3), min_size=1, max_size=12),
        st.sampled_from((BASE, *ADAPTERS)),
        params,
    ),
    min_size=1,
    max_size=7,
)


@settings(deadline=None, max_examples=examples(80))
@given(limits, asked, st.integers(0, 1), st.integers(10, 30))
def test_every_plan_of_any_traffic_is_arranged_as_its_slices_say(
    limits: StepLimits, asked: list, depth: int, blocks: int
) -> None:
    rig = Rig(limits, blocks, BLOCK_SIZE)
    builder = InputBatchBuilder(BLOCK_SIZE)
    before: InputBatch | None = None
    coming = [request(f"r{i}", *one[1:]) for i, one in enumerate(asked)]
    for i, one in enumerate(asked):
        rig.add(coming[i])
        for _ in range(one[0]):
            plan = rig.plan()
            if plan.slices:
                batch = builder.build(plan)
                check(plan, batch, before)
                before = batch
            while rig.in_flight > depth:
                rig.commit()


def test_a_steady_batch_continues_as_if_it_were_built_anew() -> None:
    rig = Rig(StepLimits(8, 64, 60), 64, BLOCK_SIZE)
    rig.add(*(request(f"r{i}", [i] * (i + 1), (BASE, *ADAPTERS)[i % 4], LONG) for i in range(8)))
    builder, equal = InputBatchBuilder(BLOCK_SIZE), 0
    before = builder.build(rig.step())
    for _ in range(30):
        plan = rig.step()
        batch, anew = builder.build(plan), InputBatchBuilder(BLOCK_SIZE).build(plan)
        check(plan, batch, before)
        for field in (each for each in fields(InputBatch) if each.name != "continues"):
            one, other = getattr(batch, field.name), getattr(anew, field.name)
            assert np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other, field.name
        equal += batch.continues
        before = batch
    assert equal >= 28, "a steady batch is not built anew"


LONG = SamplingParams(max_tokens=40, ignore_eos=True, seed=0)


def test_rows_of_one_adapter_are_one_run_after_the_base() -> None:
    rig = Rig(StepLimits(8, 64, 60), 64, BLOCK_SIZE)
    order = (ADAPTERS[1], BASE, ADAPTERS[0], ADAPTERS[1])
    rig.add(*(request(f"r{i}", [1] * 3, adapter) for i, adapter in enumerate(order)))
    batch = InputBatchBuilder(BLOCK_SIZE).build(rig.step())
    assert batch.runs == (
        AdapterRun(0, 3, ""),
        AdapterRun(3, 9, ADAPTERS[1].digest),
        AdapterRun(9, 12, ADAPTERS[0].digest),
    )
    assert _as_list(batch.places) == [1, 0, 3, 2]


def _as_list(values: Integers) -> list[int]:
    return values.tolist()
