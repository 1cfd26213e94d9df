"""How sequences end: by a token, by a limit, from outside, and while a step is in flight."""

import pytest

from lora.adapter import BASE
from scheduler.limits import StepLimits
from scheduler.plan import FinishReason, Live, SequenceKey, SliceOutput, TokenLogprob
from scheduler.request import Request, SamplingParams
from tests.scheduler.device import Tape
from tests.scheduler.rig import ADAPTERS, Rig, request

STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH
LIMITS = StepLimits(max_num_seqs=8, max_num_batched_tokens=64, max_model_len=20)
EOS, OTHER_EOS, STOP_ID, WORD = 90, 91, 80, 1


def asking(params: SamplingParams, prompt: int = 3) -> Request:
    return Request("a", tuple(range(prompt)), BASE, params, (EOS, OTHER_EOS), arrival_s=0.0)


def end_of(asked: Request, *tape: int) -> tuple[tuple[int | None, ...], FinishReason | None]:
    """The tokens that the request yields of the tape, and why it ended."""
    rig = Rig(LIMITS, device=Tape(*tape))
    rig.add(asked)
    rig.drain()
    return rig.tokens("a"), rig.events[SequenceKey("a", 0)][-1].finish_reason


@pytest.mark.parametrize(
    ("params", "tape", "reason"),
    [
        (SamplingParams(max_tokens=5), (WORD, EOS), STOP),
        (SamplingParams(max_tokens=5), (WORD, OTHER_EOS), STOP),
        (SamplingParams(max_tokens=3, ignore_eos=True), (EOS, EOS, EOS), LENGTH),
        (SamplingParams(max_tokens=5, stop_token_ids=(STOP_ID,)), (WORD, STOP_ID), STOP),
        (SamplingParams(max_tokens=5, stop_token_ids=(STOP_ID,), ignore_eos=True), (EOS, STOP_ID), STOP),
        (SamplingParams(max_tokens=2), (WORD, EOS), STOP),
        (SamplingParams(max_tokens=2), (WORD, WORD), LENGTH),
        (SamplingParams(max_tokens=1), (WORD,), LENGTH),
        (SamplingParams(max_tokens=5, min_tokens=2), (EOS, EOS, EOS), STOP),
        (
            SamplingParams(max_tokens=5, min_tokens=2, stop_token_ids=(STOP_ID,)),
            (STOP_ID, WORD, STOP_ID),
            STOP,
        ),
        (SamplingParams(max_tokens=None), (WORD,) * 17, LENGTH),
        (SamplingParams(max_tokens=17), (WORD,) * 17, LENGTH),
    ],
)
def test_a_sequence_ends_with_the_first_token_that_ends_it(
    params: SamplingParams, tape: tuple[int, ...], reason: FinishReason
) -> None:
    assert end_of(asking(params), *tape, WORD, WORD) == (tape, reason)


def test_events_carry_the_logprobs() -> None:
    rig = Rig(LIMITS)
    rig.add(asking(SamplingParams()))
    plan = rig.scheduler.plan(0.0, ())
    drawn = TokenLogprob(token_id=WORD, logprob=-0.5, rank=1, top=((WORD, -0.5),))
    (event,) = rig.scheduler.commit(plan, [SliceOutput(WORD, drawn)])
    assert (event.token_id, event.logprob, event.finish_reason) == (WORD, drawn, None)


def test_outputs_must_match_the_plan() -> None:
    rig = Rig(LIMITS)
    rig.add(asking(SamplingParams()))
    plan = rig.scheduler.plan(0.0, ())
    with pytest.raises(ValueError, match="zip"):
        rig.scheduler.commit(plan, [])
    with pytest.raises(AssertionError, match="if and only if it samples"):
        rig.scheduler.commit(plan, [SliceOutput(None)])


def test_finish_ends_one_sequence_without_an_event_and_twice_is_once() -> None:
    rig = Rig(LIMITS)
    asked = request("a", [1], params=SamplingParams(n=2, max_tokens=6, ignore_eos=True, seed=0))
    rig.add(asked)
    rig.steps(3)
    for _ in range(2):
        rig.finish(SequenceKey("a", 0))
        rig.finish(SequenceKey("unknown", 0))
    rig.drain()
    assert [len(rig.tokens("a", index)) for index in range(2)] == [3, 6]
    rig.check(asked, ended=False)


def test_siblings_go_on_when_the_first_is_finished_before_its_prompt_is_computed() -> None:
    rig = Rig(StepLimits(8, 2, 20))
    asked = request("a", range(6), params=SamplingParams(n=3, max_tokens=2, ignore_eos=True, seed=0))
    rig.add(asked)
    rig.step()
    rig.finish(SequenceKey("a", 1))
    rig.finish(SequenceKey("a", 0))
    rig.drain()
    assert [len(rig.tokens("a", index)) for index in range(3)] == [0, 0, 2]
    rig.check(asked, ended=False)


def test_abort_ends_all_sequences_of_a_request_wherever_they_are() -> None:
    rig = Rig(StepLimits(2, 64, 20))
    kept = request("b", [2])
    rig.add(request("a", [1], params=SamplingParams(n=3, max_tokens=6, ignore_eos=True)), kept)
    rig.steps(2)
    for _ in range(2):
        rig.abort("a")
        rig.abort("unknown")
    rig.drain()
    rig.check(kept)


def test_an_abort_while_the_step_runs_frees_the_blocks_and_voids_the_slice() -> None:
    rig = Rig(LIMITS)
    kept = request("b", [2])
    rig.add(request("a", [1]), kept)
    rig.plan()
    rig.abort("a")
    assert [event.key for event in rig.commit()] == [SequenceKey("b", 0)]
    rig.drain()
    rig.check(kept)


def test_a_finish_while_the_step_runs_voids_the_slice() -> None:
    rig = Rig(LIMITS)
    rig.add(request("a", [1]))
    rig.plan()
    rig.finish(SequenceKey("a", 0))
    assert rig.commit() == ()
    assert not rig.has_work()


def test_a_new_request_does_not_take_the_slice_of_an_aborted_one_of_the_same_id() -> None:
    rig = Rig(LIMITS)
    again = request("a", [3, 3])
    rig.add(again)
    rig.plan()
    rig.abort("a")
    rig.add(again)
    assert rig.commit() == ()
    rig.drain()
    rig.check(again)


def test_a_preemption_while_the_step_runs_voids_the_slice_and_the_token_is_drawn_again() -> None:
    rig = Rig(LIMITS, num_blocks=4, block_size=4)
    params = SamplingParams(max_tokens=6, ignore_eos=True, seed=0)
    asked = [request("a", [1] * 8, ADAPTERS[0], params), request("b", [2] * 6, params=params)]
    rig.add(*asked)
    rig.step()
    rig.ready.clear()
    assert [part.key.request_id for part in rig.plan().slices] == ["b"]
    rig.ready.add(ADAPTERS[0].digest)
    assert [part.key.request_id for part in rig.plan().slices] == ["a"]  # and takes a block of b's
    assert rig.scheduler.live() == Live(waiting=1, running=1, preemptions=1)
    assert rig.commit() == ()
    rig.drain()
    for one in asked:
        rig.check(one)
