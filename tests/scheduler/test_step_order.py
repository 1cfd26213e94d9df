"""Who runs in a step, and with how many rows."""

import pytest

from scheduler.limits import StepLimits
from scheduler.plan import PENDING, Live, SequenceKey, StepPlan
from scheduler.request import SamplingParams
from tests.scheduler.device import EOS, Tape
from tests.scheduler.rig import ADAPTERS, Rig, request

LONG = SamplingParams(max_tokens=50, ignore_eos=True, seed=0)


def shape(plan: StepPlan) -> list[tuple[str, int, int, bool]]:
    """(request, start, rows, samples) of each slice."""
    return [(part.key.request_id, part.start, len(part.token_ids), part.samples) for part in plan.slices]


def limits(seqs: int = 8, rows: int = 8) -> StepLimits:
    return StepLimits(max_num_seqs=seqs, max_num_batched_tokens=rows, max_model_len=100)


def test_nothing_to_do_is_an_empty_plan() -> None:
    rig = Rig(limits())
    assert rig.step() == StepPlan(())
    assert not rig.has_work()
    assert rig.scheduler.live() == Live(waiting=0, running=0, preemptions=0)


def test_a_prompt_is_computed_in_chunks_and_only_the_last_one_draws() -> None:
    rig = Rig(limits(rows=4))
    rig.add(request("a", range(10)))
    assert [shape(plan) for plan in rig.steps(4)] == [
        [("a", 0, 4, False)],
        [("a", 4, 4, False)],
        [("a", 8, 2, True)],
        [("a", 10, 1, True)],
    ]


def test_slices_carry_the_tokens_and_the_blocks_up_to_their_end() -> None:
    rig = Rig(limits(rows=6), block_size=4)
    rig.add(request("a", range(10)))
    first, second, third = (plan.slices[0] for plan in rig.steps(3))
    assert (first.token_ids, len(first.block_table)) == ((0, 1, 2, 3, 4, 5), 2)
    assert (second.token_ids, len(second.block_table)) == ((6, 7, 8, 9), 3)
    assert second.block_table[:2] == first.block_table
    assert third.token_ids == rig.tokens("a")[:1]
    assert [part.output_index for part in (first, second, third)] == [0, 0, 1]


def test_decode_and_chunks_share_a_step_and_decode_comes_first() -> None:
    rig = Rig(limits(rows=8))
    rig.add(request("a", range(3)))
    rig.step()
    rig.add(request("b", range(20)))
    assert shape(rig.step()) == [("a", 3, 1, True), ("b", 0, 7, False)]
    assert shape(rig.step()) == [("a", 4, 1, True), ("b", 7, 7, False)]


def test_decode_goes_before_the_chunks_of_a_prompt_that_was_admitted_earlier() -> None:
    rig = Rig(limits(rows=4))
    rig.add(request("a", range(20), ADAPTERS[0]))
    rig.step()
    rig.ready.clear()  # a stalls amid its prompt, and b gets in
    rig.add(request("b", range(2)))
    assert shape(rig.step()) == [("b", 0, 2, True)]
    rig.ready.add(ADAPTERS[0].digest)
    assert shape(rig.step()) == [("b", 2, 1, True), ("a", 4, 3, False)]


def test_admission_is_first_come_first_served_within_the_rows() -> None:
    rig = Rig(limits(rows=8))
    rig.add(request("a", range(5)), request("b", range(5)), request("c", range(1)))
    assert shape(rig.step()) == [("a", 0, 5, True), ("b", 0, 3, False)]
    assert shape(rig.step()) == [("a", 5, 1, True), ("b", 3, 2, True), ("c", 0, 1, True)]


def test_there_are_no_more_seats_than_rows_so_that_decode_is_never_short_of_one() -> None:
    rig = Rig(limits(seqs=8, rows=2))
    rig.add(*(request(name, [1], params=LONG) for name in "abc"))
    assert [shape(plan) for plan in rig.steps(2)] == [
        [("a", 0, 1, True), ("b", 0, 1, True)],
        [("a", 1, 1, True), ("b", 1, 1, True)],
    ]
    assert rig.scheduler.live() == Live(waiting=1, running=2, preemptions=0)


def test_a_seat_that_falls_free_is_taken_in_the_next_step() -> None:
    rig = Rig(limits(seqs=1))
    rig.add(request("a", [1], params=SamplingParams(max_tokens=1)), request("b", [1]))
    assert shape(rig.step()) == [("a", 0, 1, True)]
    assert shape(rig.step()) == [("b", 0, 1, True)]


def test_what_does_not_fit_in_blocks_is_not_overtaken() -> None:
    rig = Rig(limits(rows=40), num_blocks=6, block_size=4)
    rig.add(request("a", range(12)), request("b", range(16)), request("c", [1]))
    assert shape(rig.step()) == [("a", 0, 12, True)]
    assert rig.scheduler.live() == Live(waiting=2, running=1, preemptions=0)


def test_blocks_for_the_whole_prompt_are_taken_at_admission() -> None:
    rig = Rig(limits(rows=4), num_blocks=8, block_size=4)
    rig.add(request("a", range(20)))
    rig.step()
    assert rig.pool.stats().used == 5


def test_outputs_ride_along_only_where_penalties_need_them() -> None:
    rig = Rig(limits())
    rig.add(
        request("a", [1], params=SamplingParams(max_tokens=3, ignore_eos=True, presence_penalty=1, seed=0))
    )
    rig.add(request("b", [1]))
    plans = rig.steps(3)
    assert [plan.slices[0].output_token_ids for plan in plans] == [rig.tokens("a")[:i] for i in range(3)]
    assert all(plan.slices[1].output_token_ids == () for plan in plans)


def test_siblings_wait_for_the_first_and_share_the_blocks_of_its_prompt() -> None:
    rig = Rig(limits(rows=32), block_size=4)
    asked = request("a", range(10), params=SamplingParams(n=3, max_tokens=2, ignore_eos=True, seed=0))
    rig.add(asked)
    first, second = rig.steps(2)
    assert [(part.key.index, part.start, len(part.token_ids)) for part in first.slices] == [(0, 0, 10)]
    assert [(part.key.index, part.start, len(part.token_ids)) for part in second.slices] == [
        (0, 10, 1),
        (1, 8, 2),
        (2, 8, 2),
    ]
    shared = {part.block_table[:2] for part in second.slices}
    assert len(shared) == 1
    rig.drain()
    rig.check(asked)
    cached = [rig.events[SequenceKey("a", index)][0].cached_tokens for index in range(3)]
    assert cached == [0, 8, 8]


def test_others_are_admitted_while_siblings_wait_for_the_first() -> None:
    rig = Rig(limits(rows=6))
    rig.add(request("a", range(8), params=SamplingParams(n=2, max_tokens=2, seed=0)), request("b", [1]))
    assert shape(rig.step()) == [("a", 0, 6, False)]
    assert shape(rig.step()) == [("a", 6, 2, True), ("b", 0, 1, True)]


def test_the_plan_names_its_adapters() -> None:
    rig = Rig(limits())
    rig.add(request("a", [1], ADAPTERS[1]), request("b", [1]), request("c", [1], ADAPTERS[0]))
    assert rig.step().adapters == (ADAPTERS[1], ADAPTERS[0])


def test_a_plan_may_go_on_from_tokens_that_are_still_being_drawn() -> None:
    rig = Rig(limits(seqs=2, rows=2))
    asked = [request("a", [1]), request("b", [2])]
    rig.add(asked[0])
    rig.plan()
    rig.add(asked[1])
    ahead = rig.plan()
    assert shape(ahead) == [("a", 1, 1, True), ("b", 0, 1, True)]
    assert ahead.slices[0].token_ids == (PENDING,)
    rig.commit()
    rig.drain()
    for one in asked:
        rig.check(one)


def test_a_prompt_goes_on_by_chunks_that_are_planned_ahead() -> None:
    rig = Rig(limits(rows=2))
    asked = request("a", [1, 2, 3, 0, 1])
    rig.add(asked)
    assert [part for _ in range(3) for part in shape(rig.plan())] == [
        ("a", 0, 2, False),
        ("a", 2, 2, False),
        ("a", 4, 1, True),
    ]
    rig.drain()
    rig.check(asked)


def test_nothing_is_planned_past_the_last_token_that_a_sequence_may_draw() -> None:
    rig = Rig(limits())
    asked = request("a", [1], params=SamplingParams(max_tokens=2, ignore_eos=True, seed=0))
    rig.add(asked)
    assert [len(rig.plan().slices) for _ in range(3)] == [1, 1, 0]
    rig.drain()
    rig.check(asked)


def test_a_step_run_ahead_of_an_end_is_passed_over() -> None:
    rig = Rig(limits(), device=Tape(3, EOS, 1, 1))
    rig.add(request("a", [1], params=SamplingParams(max_tokens=9, seed=0)))
    for _ in range(3):
        rig.plan()
    assert [len(rig.commit()) for _ in range(3)] == [1, 1, 0]
    assert rig.tokens("a") == (3, EOS)
    assert not rig.has_work()


def test_a_draw_that_depends_on_a_pending_token_waits_for_it() -> None:
    rig = Rig(limits())
    params = SamplingParams(max_tokens=4, presence_penalty=1.0, ignore_eos=True, seed=0)
    asked = [request("a", [1], params=params), request("b", [2])]
    rig.add(*asked)
    rig.plan()
    assert rig.scheduler.waits_for_tokens()
    assert shape(rig.plan()) == [("b", 1, 1, True)]
    rig.commit()
    assert not rig.scheduler.waits_for_tokens()
    rig.drain()
    for one in asked:
        rig.check(one)


@pytest.mark.parametrize("fields", [(0, 1, 2, 0.0), (1, 0, 2, 0.0), (1, 1, 1, 0.0), (1, 1, 2, -1.0)])
def test_limits_that_admit_nothing_are_refused(fields: tuple[int, int, int, float]) -> None:
    with pytest.raises(ValueError, match="give"):
        StepLimits(*fields)
