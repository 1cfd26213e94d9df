"""Who is admitted first, who is late, and streams that have moved here."""

from dataclasses import replace

import pytest

from scheduler.limits import RequestRefused, StepLimits
from scheduler.plan import StepPlan
from scheduler.request import InvalidParameter, Request, SamplingParams
from tests.scheduler.device import EOS
from tests.scheduler.rig import ADAPTERS, Rig, request

SHORT = SamplingParams(max_tokens=8, ignore_eos=True, seed=0)
LONG = SamplingParams(max_tokens=50, ignore_eos=True, seed=0)


def names(plan: StepPlan) -> list[str]:
    return [part.key.request_id for part in plan.slices]


def one_seat() -> Rig:
    """A rig whose only seat is taken for two steps."""
    rig = Rig(StepLimits(1, 8, 100))
    rig.add(request("first", [1], params=SamplingParams(max_tokens=2, ignore_eos=True, seed=0)))
    rig.step()
    return rig


def order_of(*asked: Request) -> list[str]:
    rig = one_seat()
    rig.add(*asked)
    rig.drain()
    return list(dict.fromkeys(name for plan in rig.plans for name in names(plan)))[1:]


def test_priority_then_deadline_then_arrival_say_who_is_admitted_first() -> None:
    one = request("", [1])
    asked = (
        replace(one, request_id="last", priority=1, first_token_by_s=50.0),
        replace(one, request_id="without deadline"),
        replace(one, request_id="loose", first_token_by_s=90.0),
        replace(one, request_id="tight", first_token_by_s=60.0, arrival_s=2.0),
        replace(one, request_id="tight and earlier", first_token_by_s=60.0, arrival_s=1.0),
        replace(one, request_id="urgent", priority=-1),
    )
    assert order_of(*asked) == ["urgent", "tight and earlier", "tight", "loose", "without deadline", "last"]


def test_equals_are_admitted_in_the_order_in_which_they_came() -> None:
    assert order_of(*(request(name, [1]) for name in "bca")) == ["b", "c", "a"]


def test_what_was_preempted_goes_before_any_priority() -> None:
    rig = Rig(StepLimits(4, 64, 100), num_blocks=4, block_size=4)
    rig.add(request("a", [1] * 8, params=SHORT), request("b", [2] * 6, params=SHORT))
    rig.steps(3)
    assert rig.scheduler.live().preemptions == 1
    rig.add(replace(request("urgent", [3]), priority=-5))
    rig.finish(rig.plans[0].slices[0].key)
    assert names(rig.step()) == ["b", "urgent"]


def test_a_stream_that_moved_here_goes_before_what_has_not_begun() -> None:
    urgent = replace(request("urgent", [1]), priority=-5)
    assert order_of(urgent, replace(request("moved", [1]), drawn_token_ids=(1,))) == ["moved", "urgent"]


def test_late_is_what_waits_unbegun_past_the_time_of_its_first_token() -> None:
    rig = one_seat()
    asked = [
        replace(request(name, [1], params=LONG), first_token_by_s=by) for name, by in (("a", 5.0), ("b", 3.0))
    ]
    rig.add(*asked, request("without", [1]))
    assert rig.scheduler.late(3.0) == ()
    assert rig.scheduler.late(4.0) == ("b",)
    assert rig.scheduler.late(4.0) == ("b",), "until it is aborted"
    rig.abort("b")
    assert rig.scheduler.late(5.0) == ()
    assert rig.scheduler.late(6.0) == ("a",)
    rig.steps(3)
    assert names(rig.plans[-1]) == ["a"]
    assert rig.scheduler.late(1e9) == (), "it has begun"


def test_what_was_preempted_or_has_moved_is_not_late() -> None:
    rig = Rig(StepLimits(4, 64, 100), num_blocks=4, block_size=4)
    due = [replace(request(n, [i] * 6, params=SHORT), first_token_by_s=1.0) for i, n in enumerate("ab")]
    rig.add(*due)
    rig.steps(4)
    assert rig.scheduler.live().preemptions == 1
    rig.add(replace(request("moved", [7], params=SHORT), first_token_by_s=1.0, drawn_token_ids=(1, 2)))
    assert rig.scheduler.late(9.0) == ()


def test_siblings_are_late_only_if_none_of_them_has_begun() -> None:
    rig = Rig(StepLimits(1, 8, 100))
    three = SamplingParams(n=3, max_tokens=4, ignore_eos=True, seed=0)
    begun, waits = (replace(request(name, [1] * 9, params=three), first_token_by_s=1.0) for name in "ab")
    rig.add(begun, waits)
    rig.step()
    assert rig.scheduler.late(9.0) == ("b",)
    rig.abort("b")
    rig.steps(3)
    assert rig.scheduler.late(9.0) == ()
    rig.drain()
    rig.check(begun)


def test_cached_tokens_of_a_moved_stream_are_counted_with_its_output() -> None:
    rig = Rig(StepLimits(4, 64, 100), num_blocks=16, block_size=4)
    whole = request("a", range(4), ADAPTERS[0], SamplingParams(max_tokens=12, ignore_eos=True, seed=0))
    rig.add(whole)
    rig.drain()
    drawn = tuple(token for token in rig.tokens("a")[:8] if token is not None)
    rig.add(replace(whole, request_id="again", drawn_token_ids=drawn))
    rig.drain()
    stats = rig.pool.stats()
    assert (stats.hit_tokens, stats.queried_tokens) == (8, 12)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"priority": 1001}, "priority"),
        ({"priority": 0.5}, "priority"),
        ({"first_token_by_s": float("nan")}, "first_token_by_s"),
        ({"drawn_token_ids": (1,), "params": SamplingParams(n=2)}, "drawn_token_ids"),
        ({"drawn_token_ids": (1, 1), "params": SamplingParams(max_tokens=2)}, "drawn_token_ids"),
        ({"drawn_token_ids": (1, EOS), "params": SamplingParams()}, "drawn_token_ids"),
        ({"drawn_token_ids": (3, 1), "params": SamplingParams(stop_token_ids=(3,))}, "drawn_token_ids"),
    ],
)
def test_what_no_request_can_mean_is_refused_by_its_field(fields: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidParameter, match=f"^{field}="):
        replace(request("a", [1]), **fields)  # pyright: ignore[reportArgumentType]


def test_an_end_token_below_min_tokens_ended_nothing() -> None:
    least = SamplingParams(min_tokens=2, max_tokens=4)
    assert replace(request("a", [1], params=least), drawn_token_ids=(EOS, EOS, 1)).drawn_token_ids


def test_drawn_tokens_count_into_the_longest_sequence() -> None:
    rig = Rig(StepLimits(4, 64, 10))
    endless = request("a", [1] * 5, params=SamplingParams(max_tokens=None, ignore_eos=True))
    with pytest.raises(RequestRefused, match="maximum context length is 10"):
        rig.add(replace(endless, drawn_token_ids=(1,) * 5))
    rig.add(replace(endless, drawn_token_ids=(1,) * 4))
    rig.drain()
    assert len(rig.tokens("a")) == 1
