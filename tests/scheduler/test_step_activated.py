"""Activated LoRAs in a step: what is read without the adapter, with whom it is shared, and who waits."""

from dataclasses import replace

from lora.adapter import BASE, AdapterRef
from scheduler.limits import StepLimits
from scheduler.plan import StepPlan
from scheduler.request import SamplingParams
from tests.scheduler.rig import ACTIVATED, ADAPTERS, Rig, request

ONE, TWO = ACTIVATED  # they act from 1, and from 2, 3
SHORT = SamplingParams(max_tokens=2, ignore_eos=True, seed=0)
TEXT = [0] * 9


def rows(plan: StepPlan) -> list[tuple[AdapterRef, int, int]]:
    """Return each slice's adapter, first position and length."""
    return [(part.adapter, part.start, len(part.token_ids)) for part in plan.slices]


def rig_of(most_rows: int = 64, seqs: int = 4, patience_s: float = 1e9) -> Rig:
    return Rig(StepLimits(seqs, most_rows, 100, patience_s))


def test_a_slice_ends_where_the_adapter_begins_to_act() -> None:
    rig = rig_of(5)
    one = request("one", [*TEXT, 1, 0], ONE, SHORT)
    rig.add(one)
    told = [rows(plan) for plan in rig.steps(4)]
    assert told == [[(BASE, 0, 5)], [(BASE, 5, 4)], [(ONE, 9, 2)], [(ONE, 11, 1)]]
    rig.check(one)


def test_without_the_invocation_the_base_draws_and_no_adapter_is_wanted() -> None:
    rig = rig_of()
    rig.ready.clear()
    one = request("one", TEXT, ONE, SHORT)
    rig.add(one)
    assert [rows(plan) for plan in rig.steps(2)] == [[(BASE, 0, 9)], [(BASE, 9, 1)]]
    assert rig.scheduler.wanted(8) == ()
    rig.check(one)


def test_an_invocation_at_the_start_leaves_the_base_nothing() -> None:
    rig = rig_of()
    rig.add(request("one", [1, *TEXT], ONE, SHORT))
    assert rows(rig.step()) == [(ONE, 0, 10)]


def test_adapters_and_the_base_share_whole_blocks_before_the_invocation() -> None:
    rig = rig_of()
    asked = [
        request("base", [*TEXT, 4], BASE, SHORT),
        request("one", [*TEXT, 1], ONE, SHORT),
        request("two", [*TEXT, 2, 3], TWO, SHORT),
        request("again", [*TEXT, 1], ONE, SHORT),
        request("plain", [*TEXT, 1], ADAPTERS[0], SHORT),
    ]
    for each in asked:
        rig.add(each)
        rig.drain()
        rig.check(each)
    cached = [next(iter(events)).cached_tokens for events in rig.events.values()]
    assert cached == [0, 8, 8, 8, 0]


def test_nothing_is_shared_under_another_salt() -> None:
    rig = rig_of()
    for name, adapter, salt in (
        ("base", BASE, ""),
        ("one", ONE, "x"),
        ("two", TWO, "x"),
        ("again", BASE, ""),
    ):
        rig.add(replace(request(name, [*TEXT, 1, 2, 3], adapter, SHORT), cache_salt=salt))
        rig.drain()
    cached = [next(iter(events)).cached_tokens for events in rig.events.values()]
    assert cached == [0, 0, 8, 8]


def test_what_stands_before_the_invocation_is_read_while_the_adapter_comes() -> None:
    rig = rig_of(5)
    rig.ready.clear()
    one = request("one", [*TEXT, 1, 0], ONE, SHORT)
    rig.add(one)
    assert rows(rig.plan()) == [(BASE, 0, 5)]
    assert rig.scheduler.wanted(8) == (ONE,)
    rig.commit()
    assert rows(rig.step()) == [(BASE, 5, 4)]
    rig.ready.add(ONE.digest)
    assert rows(rig.step()) == [(ONE, 9, 2)]
    rig.drain()
    rig.check(one)


def test_who_has_read_ahead_and_still_lacks_the_adapter_holds_no_blocks_nor_a_seat() -> None:
    rig = rig_of(seqs=1)
    rig.ready.clear()
    one, base = request("one", [*TEXT, 1, 0], ONE, SHORT), request("base", [4, 4], BASE, SHORT)
    rig.add(one)
    assert rows(rig.step()) == [(BASE, 0, 9)]
    rig.add(base)
    assert rows(rig.step()) == [(BASE, 0, 2)]
    live = rig.scheduler.live()
    assert (live.waiting, live.running, live.preemptions) == (1, 1, 0)
    rig.steps(2)
    assert rig.pool.stats().used == 0
    rig.ready.add(ONE.digest)
    assert rows(rig.step()) == [(BASE, 8, 1)], "the whole blocks are in the prefix cache"
    assert rows(rig.step()) == [(ONE, 9, 2)]
    rig.drain()
    rig.check(one)
    rig.check(base)


def test_where_all_is_read_already_the_adapter_is_waited_for() -> None:
    rig = rig_of(patience_s=3.0)
    rig.add(request("base", TEXT, BASE, SHORT))
    rig.drain()
    rig.ready.clear()
    begun = rig.now
    rig.add(request("one", [*TEXT, 1], ONE, SHORT))
    assert not rig.step().slices
    assert rig.pool.stats().used == 0
    rig.now = begun + 3.0
    rig.step()
    overdue = rig.scheduler.overdue()
    assert overdue is not None
    assert overdue.adapter is ONE


def test_adapters_that_are_to_leave_get_no_more_sequences_that_would_read_ahead() -> None:
    rig = rig_of()
    rig.leaving = {ONE.digest}
    rig.add(request("one", [*TEXT, 1], ONE, SHORT))
    assert not rig.step().slices
    rig.leaving = set()
    assert rows(rig.step()) == [(BASE, 0, 9)]
