"""Blocks: what is refused, shared, taken away and recomputed."""

from collections.abc import Iterable

import pytest

from lora.adapter import BASE, AdapterRef
from scheduler.limits import RequestRefused, StepLimits
from scheduler.plan import Live, SequenceKey, StepPlan
from scheduler.request import SamplingParams
from tests.scheduler.rig import ADAPTERS, Rig, request

LIMITS = StepLimits(max_num_seqs=8, max_num_batched_tokens=64, max_model_len=100)


def greedy(max_tokens: int | None, prompt_logprobs: int | None = None, n: int = 1) -> SamplingParams:
    return SamplingParams(
        n=n, max_tokens=max_tokens, ignore_eos=True, seed=0, prompt_logprobs=prompt_logprobs
    )


def rows(plan: StepPlan) -> dict[str, tuple[int, int]]:
    """(start, rows) of each request's slice."""
    return {part.key.request_id: (part.start, len(part.token_ids)) for part in plan.slices}


def cached(rig: Rig, request_id: str) -> int:
    """The cached tokens that a request's first event tells."""
    return rig.events[SequenceKey(request_id, 0)][0].cached_tokens


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        (0, 1, r"request_id='a' has an empty prompt"),
        (100, None, r"maximum context length is 100 tokens.* has 100 in its prompt and no max_tokens: sh"),
        (99, 2, r"maximum context length is 100 tokens.* has 99 in its prompt and max_tokens=2: sho"),
        (
            50,
            16,
            r"50 in its prompt and max_tokens=16, .* needs 17 K/V blocks of 4 tokens and there are 16",
        ),
        (
            10,
            None,
            r"maximum context length is 100 .* no max_tokens, which needs 25 K/V blocks .* there are 16: .* 65 tokens",
        ),
    ],
)
def test_what_can_never_run_is_refused_with_the_numbers(
    prompt: int, max_tokens: int | None, message: str
) -> None:
    rig = Rig(LIMITS, num_blocks=16, block_size=4)
    with pytest.raises(RequestRefused, match=message):
        rig.add(request("a", range(prompt), params=greedy(max_tokens)))
    assert not rig.has_work()


def test_what_fits_to_the_last_block_is_run() -> None:
    rig = Rig(LIMITS, num_blocks=16, block_size=4)
    asked = request("a", range(50), params=greedy(15))  # 64 tokens are computed, the 65th is only drawn
    rig.add(asked)
    rig.drain()
    rig.check(asked)


def test_what_fits_the_length_exactly_is_run() -> None:
    rig = Rig(LIMITS)
    asked = request("a", range(99), params=greedy(1))
    rig.add(asked)
    rig.drain()
    rig.check(asked)


def test_an_id_is_refused_while_it_lives_and_free_afterwards() -> None:
    rig = Rig(LIMITS)
    rig.add(request("a", [1]))
    with pytest.raises(RequestRefused, match="request_id='a' is live already"):
        rig.add(request("a", [2]))
    rig.drain()
    rig.add(request("a", [2]))


def test_a_prompt_seen_before_is_not_computed_again() -> None:
    rig = Rig(LIMITS, block_size=4)
    rig.add(request("a", range(10)))
    rig.drain()
    rig.add(request("b", [*range(8), 50, 51, 52]))
    assert rows(rig.step()) == {"b": (8, 3)}
    assert (cached(rig, "a"), cached(rig, "b")) == (0, 8)
    stats = rig.pool.stats()
    assert (stats.hit_tokens, stats.queried_tokens) == (8, 21)


def test_at_least_the_last_token_of_a_prompt_is_computed() -> None:
    rig = Rig(LIMITS, block_size=4)
    rig.add(request("a", range(8)))
    rig.drain()
    rig.add(request("b", range(8)))
    assert rows(rig.step()) == {"b": (4, 4)}


def test_drawn_tokens_are_reused_as_a_prompt() -> None:
    rig = Rig(LIMITS, block_size=4)
    rig.add(request("a", range(6), params=greedy(7)))
    rig.drain()
    drawn = [token for token in rig.tokens("a") if token is not None]
    rig.add(request("b", [*range(6), *drawn]))
    assert rows(rig.step()) == {"b": (12, 1)}


def test_a_prefix_still_being_held_is_shared() -> None:
    rig = Rig(LIMITS, block_size=4)
    rig.add(request("a", range(10)))
    rig.step()
    rig.add(request("b", range(10)))
    plan = rig.step()
    assert rows(plan) == {"a": (10, 1), "b": (8, 2)}
    assert plan.slices[0].block_table[:2] == plan.slices[1].block_table[:2]


@pytest.mark.parametrize("other", [BASE, ADAPTERS[1]])
def test_adapters_share_no_prefix(other: AdapterRef) -> None:
    rig = Rig(LIMITS, block_size=4)
    rig.add(request("a", range(10), ADAPTERS[0]))
    rig.drain()
    rig.add(request("b", range(10), other))
    assert rows(rig.step()) == {"b": (0, 10)}
    rig.add(request("c", range(10), ADAPTERS[0]))
    assert rows(rig.step())["c"] == (8, 2)


def test_prompt_logprobs_are_computed_even_where_the_prefix_is_cached() -> None:
    rig = Rig(LIMITS, block_size=4)
    asked = request("b", range(10), params=greedy(2, prompt_logprobs=0))
    rig.add(request("a", range(10)))
    rig.drain()
    rig.add(asked)
    assert rows(rig.step()) == {"b": (0, 10)}
    rig.drain()
    rig.check(asked)
    assert cached(rig, "b") == 0
    assert rig.pool.stats().queried_tokens == 10


def test_siblings_take_the_prompt_logprobs_of_the_first() -> None:
    rig = Rig(LIMITS, block_size=4)
    asked = request("a", range(10), params=greedy(2, prompt_logprobs=0, n=2))
    rig.add(asked)
    _, second = rig.steps(2)
    assert [(part.key.index, part.start, part.prompt_logprobs) for part in second.slices] == [
        (0, 10, False),
        (1, 8, False),
    ]
    rig.drain()
    rig.check(asked)


def test_a_prompt_of_one_token_has_no_prompt_logprobs() -> None:
    rig = Rig(LIMITS)
    asked = request("a", [1], params=greedy(2, prompt_logprobs=0))
    rig.add(asked)
    assert not rig.step().slices[0].prompt_logprobs
    rig.drain()
    rig.check(asked)


def test_the_last_admitted_gives_way_and_comes_back_first() -> None:
    rig = Rig(LIMITS, num_blocks=6, block_size=4)
    asked = [request(name, [number] * 7, params=greedy(6)) for number, name in enumerate("abc")]
    rig.add(*asked)
    late = request("d", [9], params=greedy(1))
    plans = [rows(rig.step()) for _ in range(2)]
    assert plans == [{"a": (0, 7), "b": (0, 7), "c": (0, 7)}, {"a": (7, 1), "b": (7, 1), "c": (7, 1)}]
    rig.add(late)
    assert rows(rig.step()) == {"a": (8, 1), "b": (8, 1)}  # both take a block of c's
    assert rig.scheduler.live() == Live(waiting=2, running=2, preemptions=1)
    rig.steps(3)
    back = rig.step()
    assert rows(back)["c"] == (0, 9)  # its blocks went to a and b
    assert list(rows(back)) == ["c", "d"]
    rig.drain()
    for one in (*asked, late):
        rig.check(one)


@pytest.mark.parametrize(("num_blocks", "resumed"), [(7, (16, 1)), (6, (12, 5))])
def test_only_what_was_evicted_since_the_preemption_is_recomputed(
    num_blocks: int, resumed: tuple[int, int]
) -> None:
    asked = [request("a", [1] * 7, params=greedy(3)), request("b", [2] * 15, params=greedy(6))]
    rig = Rig(LIMITS, num_blocks, block_size=4)
    rig.add(*asked)
    assert [rows(plan) for plan in rig.steps(4)] == [
        {"a": (0, 7), "b": (0, 15)},
        {"a": (7, 1), "b": (15, 1)},
        {"a": (8, 1)},
        {"b": resumed},
    ]
    assert cached(rig, "b") == 0
    rig.drain()
    for one in asked:
        rig.check(one)


def test_prompt_logprobs_survive_a_preemption_amid_the_prompt() -> None:
    rig = Rig(StepLimits(8, 9, 100), num_blocks=8, block_size=4)
    first = request("a", [1] * 7, params=greedy(3))
    second = request("b", range(20), ADAPTERS[0], params=greedy(2, prompt_logprobs=0))
    rig.add(first, second)
    rig.steps(2)
    rig.add(request("c", [3] * 3, params=greedy(3)))
    rig.ready.clear()
    rig.steps(4)
    rig.ready.add(ADAPTERS[0].digest)
    rig.drain()
    rig.check(first)
    rig.check(second)


def test_what_had_no_room_is_looked_up_again_only_when_a_block_was_released() -> None:
    rig = Rig(LIMITS, num_blocks=6, block_size=4)
    looked_up: list[int] = []
    lookup = rig.pool.lookup

    def counting(digests: Iterable[bytes]) -> tuple[int, ...]:
        looked_up.append(1)
        return lookup(digests)

    rig.add(request("first", [9]))
    rig.drain()
    rig.pool.lookup = counting
    rig.add(request("a", [1] * 7, params=greedy(6)), request("b", [2] * 17, params=greedy(1)))
    rig.steps(6)
    assert len(looked_up) == 2  # each once, at admission
    assert rows(rig.step()) == {"b": (0, 17)}
    assert len(looked_up) == 3


def test_a_sequence_whose_adapter_is_away_gives_way_before_one_that_could_run() -> None:
    rig = Rig(LIMITS, num_blocks=6, block_size=4)
    asked = [request("a", [1] * 7, ADAPTERS[0], greedy(6)), request("b", [2] * 15, params=greedy(6))]
    rig.add(*asked)
    rig.step()
    rig.ready.clear()
    assert [rows(plan) for plan in rig.steps(2)] == [{"b": (15, 1)}, {"b": (16, 1)}]
    assert rig.scheduler.live() == Live(waiting=1, running=1, preemptions=1)
    rig.ready.add(ADAPTERS[0].digest)
    rig.drain()
    for one in asked:
        rig.check(one)
