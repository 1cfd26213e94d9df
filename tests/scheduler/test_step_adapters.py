"""Adapters that come and go: who waits for them, and for how long."""

from lora.adapter import BASE
from scheduler.limits import StepLimits
from scheduler.plan import Overdue, StepPlan
from scheduler.request import SamplingParams
from tests.scheduler.rig import ADAPTERS, Rig, request

A, B, C = ADAPTERS
LONG = SamplingParams(max_tokens=40, ignore_eos=True, seed=0)


def rig_with(ready: str = "", seqs: int = 4, patience_s: float = 1e9) -> Rig:
    rig = Rig(StepLimits(seqs, 64, 100, patience_s))
    rig.ready = {adapter.digest for name, adapter in zip("ABC", ADAPTERS, strict=True) if name in ready}
    return rig


def names(plan: StepPlan) -> list[str]:
    return [part.key.request_id for part in plan.slices]


def test_a_sequence_waits_for_its_adapter_and_the_rest_run() -> None:
    rig = rig_with("A")
    rig.add(request("b", [1], B), request("a", [1], A), request("base", [1]))
    assert names(rig.step()) == ["a", "base"]
    rig.ready.add(B.digest)
    assert names(rig.step()) == ["a", "base", "b"]


def test_the_base_model_is_always_ready() -> None:
    rig = rig_with()
    rig.add(request("base", [1], BASE))
    assert names(rig.step()) == ["base"]


def test_a_running_sequence_whose_adapter_leaves_stalls_and_goes_on() -> None:
    rig = rig_with("A")
    asked = request("a", [1], A, LONG)
    rig.add(asked, request("base", [1], params=LONG))
    rig.steps(2)
    rig.ready.clear()
    assert names(rig.step()) == ["base"]
    rig.ready.add(A.digest)
    assert names(rig.step()) == ["a", "base"]
    rig.drain()
    rig.check(asked)


def test_wanted_names_what_is_missing_once_each_running_first_then_the_oldest() -> None:
    rig = rig_with("C")
    rig.add(request("c", [1], C, LONG))
    rig.step()
    rig.add(request("b", [1], B), request("b2", [2], B), request("base", [1]), request("a", [1], A))
    assert rig.scheduler.wanted(8) == (B, A)
    rig.ready.clear()
    rig.step()
    assert rig.scheduler.wanted(8) == (C, B, A)
    assert rig.scheduler.wanted(2) == (C, B)
    assert rig.scheduler.wanted(0) == ()
    rig.ready |= {B.digest, C.digest}
    rig.step()
    assert rig.scheduler.wanted(8) == (A,)


def test_within_its_patience_a_sequence_is_overtaken() -> None:
    rig = rig_with("A", patience_s=5.0)
    rig.add(request("b", [1], B), request("a", [1], A))
    assert names(rig.step()) == ["a"]
    rig.now = 4.9
    rig.add(request("a2", [1], A))
    assert names(rig.step()) == ["a", "a2"]


def test_out_of_patience_it_is_overdue_and_only_what_is_to_leave_waits() -> None:
    rig = rig_with("AC", patience_s=5.0)
    rig.add(request("first", [1], A, LONG), request("b", [1], B))
    rig.step()
    assert rig.scheduler.overdue() is None
    rig.now = 5.0
    rig.step()
    assert rig.scheduler.overdue() == Overdue(B, frozenset({A.digest}))
    rig.leaving = {A.digest}
    rig.add(request("behind", [1], A), request("base", [1]), request("c", [1], C))
    assert names(rig.step()) == ["first", "base", "c"]
    rig.leaving = set()
    rig.ready = {B.digest}
    assert names(rig.step())[-1] == "b"
    assert rig.scheduler.overdue() is None


def test_what_is_overdue_is_wanted_before_what_stalls() -> None:
    rig = rig_with("A", patience_s=5.0)
    rig.add(request("b", [1], B))
    rig.step()
    rig.add(request("a", [1], A, LONG))
    rig.step()
    rig.ready, rig.now = set(), 5.0
    rig.step()
    assert rig.scheduler.wanted(8) == (B, A)
    assert rig.scheduler.overdue() == Overdue(B, frozenset({A.digest}))


def test_a_running_sequence_that_stalls_too_long_is_overdue_before_those_that_wait() -> None:
    rig = rig_with("A", patience_s=5.0)
    rig.add(request("a", [1], A, LONG), request("b", [1], B))
    rig.step()
    rig.ready = set()
    rig.step()
    rig.now += 5.0
    rig.step()
    assert rig.scheduler.overdue() == Overdue(A, frozenset({A.digest}))
    rig.ready = {A.digest}
    rig.step()
    assert rig.scheduler.overdue() == Overdue(B, frozenset({A.digest}))


def test_patience_runs_from_when_the_sequence_could_have_been_admitted() -> None:
    rig = rig_with("A", seqs=1, patience_s=5.0)
    rig.add(request("first", [1], A, SamplingParams(max_tokens=8, ignore_eos=True, seed=0)))
    rig.add(request("b", [1], B), request("a", [1], A, LONG))
    rig.steps(8)  # the only seat was taken: nobody was passed over yet
    assert rig.now == 8.0
    assert names(rig.step()) == ["a"]
    assert rig.scheduler.overdue() is None


def test_patience_starts_anew_once_a_sequence_has_run() -> None:
    rig = Rig(StepLimits(4, 64, 100, adapter_patience_s=5.0), num_blocks=6, block_size=4)
    params = SamplingParams(max_tokens=6, ignore_eos=True, seed=0)
    rig.add(request("a", [1] * 7, A, params), request("b", [2] * 15, params=params))
    rig.ready = set()
    assert names(rig.step()) == ["b"]
    rig.ready = {A.digest}
    assert names(rig.step()) == ["b", "a"]
    rig.ready = set()
    rig.now = 10.0
    rig.add(request("c", [3]))
    assert names(rig.step()) == ["b", "c"]  # b took a block of a's, which waits again
    assert rig.scheduler.live().preemptions == 1
    rig.ready = {A.digest}
    rig.drain()


def test_without_patience_a_cold_adapter_is_overdue_at_once() -> None:
    rig = rig_with("A", patience_s=0.0)
    rig.add(request("b", [1], B), request("a", [1], A))
    rig.step()
    assert rig.scheduler.overdue() == Overdue(B, frozenset({A.digest}))


def test_a_stream_of_hot_requests_cannot_starve_a_cold_adapter() -> None:
    """One slot: B can load only when nothing of A runs, and a new A arrives in every step."""
    patience_s, drawn = 6.0, 5
    rig = rig_with("A", seqs=3, patience_s=patience_s)
    asked = request("cold", [1], B)
    params = SamplingParams(max_tokens=drawn, ignore_eos=True, seed=0)
    arrived_s, admitted_s = 4.0, None
    for number in range(40):
        rig.add(request(f"hot-{number}", [number], A, params))
        if rig.now == arrived_s:
            rig.add(asked)
        overdue = rig.scheduler.overdue()
        rig.leaving = rig.ready - {B.digest} if overdue else set()
        if overdue and not overdue.running:
            rig.ready, rig.leaving = {B.digest}, set()
        plan = rig.step()
        if "cold" in names(plan):
            admitted_s = rig.now
            break
    assert admitted_s is not None
    wait_for_a_seat_s, load_s = drawn * 2, 2
    assert admitted_s - arrived_s <= wait_for_a_seat_s + patience_s + drawn + load_s
