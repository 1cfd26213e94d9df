"""Sampling against references that follow the definitions token by token in float64."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.sampling.sample import InvalidLogits, SampleRow, prompt_logprobs, sample
from tests.chance import examples

VOCAB = 48


def make_logits(rows: int, vocab: int = VOCAB, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def tokens(logits: Tensor, rows: list[SampleRow]) -> list[int]:
    return [drawn.token_id for drawn in sample(logits, rows)]


def drawable(logits: Tensor, row: SampleRow) -> set[int]:
    """Every token that the row draws at some of many positions."""
    count = 1500
    return set(tokens(logits.expand(count, -1), [replace(row, position=i) for i in range(count)]))


def reference_distribution(logits: list[float], row: SampleRow) -> list[float]:
    """The filters by their definitions: temperature, then top_k, then top_p, then min_p."""
    scaled = [x / row.temperature for x in logits]
    probabilities = normalised([math.exp(x - max(scaled)) for x in scaled])
    order = sorted(range(len(logits)), key=lambda token: -scaled[token])
    kept = order[: row.top_k] if row.top_k else order
    probabilities = normalised([p if token in kept else 0.0 for token, p in enumerate(probabilities)])
    nucleus, reached = [], 0.0
    for token in kept:
        if reached >= row.top_p:
            break
        nucleus.append(token)
        reached += probabilities[token]
    largest = max(probabilities)
    return normalised(
        [p if t in nucleus and p >= row.min_p * largest else 0.0 for t, p in enumerate(probabilities)]
    )


def normalised(weights: list[float]) -> list[float]:
    return [weight / sum(weights) for weight in weights]


def test_greedy_takes_the_largest_and_the_lowest_of_equals() -> None:
    logits = torch.zeros(3, VOCAB)
    logits[0, 17] = logits[0, 30] = 2.0
    logits[1, 5] = 1.0
    assert tokens(logits, [SampleRow(temperature=0)] * 3) == [17, 5, 0]


@pytest.mark.parametrize(
    "row",
    [
        SampleRow(),
        SampleRow(temperature=0.3),
        SampleRow(top_k=5),
        SampleRow(top_p=0.7),
        SampleRow(min_p=0.1),
        SampleRow(temperature=1.7, top_k=12, top_p=0.9, min_p=0.02),
    ],
    ids=["plain", "cold", "top_k", "top_p", "min_p", "all"],
)
def test_draws_follow_the_filtered_distribution(row: SampleRow) -> None:
    """A chi-square test over seeded draws; the bound is far out in its tail."""
    logits, count = make_logits(1), 20_000
    expected = np.array(reference_distribution(logits[0].double().tolist(), row)) * count
    drawn = Counter(
        tokens(logits.expand(count, -1), [replace(row, seed=11, position=i) for i in range(count)])
    )
    observed = np.array([drawn.get(token, 0) for token in range(VOCAB)])
    assert not observed[expected == 0].any()
    common = expected >= 5
    degrees = int(common.sum())
    chi_square = float(((observed - expected)[common] ** 2 / expected[common]).sum())
    assert chi_square < degrees + 4 * math.sqrt(2 * degrees) + 4


@settings(deadline=None, max_examples=examples(40))
@given(
    seed=st.integers(0, 1000),
    temperature=st.floats(0.2, 3.0),
    top_k=st.integers(0, VOCAB + 5),
    top_p=st.floats(0.05, 1.0),
    min_p=st.floats(0.0, 0.9),
)
def test_filters_keep_what_their_definitions_keep(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    row = SampleRow(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = make_logits(1, vocab=12, seed=seed)
    expected = reference_distribution(logits[0].double().tolist(), row)
    assert drawable(logits, row) <= {token for token, p in enumerate(expected) if p > 0}
    likely = {token for token, p in enumerate(expected) if p > 0.02}
    assert likely <= drawable(logits, row)


def test_a_nucleus_wider_than_the_first_look_is_found() -> None:
    """Nearly flat over 4000 tokens: 90 % of the mass takes more of them than are looked at first."""
    logits = make_logits(1, vocab=4000) * 0.01
    expected = reference_distribution(logits[0].double().tolist(), SampleRow(top_p=0.9))
    kept = {token for token, p in enumerate(expected) if p > 0}
    rows = [SampleRow(top_p=0.9, position=i) for i in range(2000)]
    drawn = set(tokens(logits.expand(2000, -1), rows))
    assert drawn <= kept
    assert len(drawn) > 1024


def test_top_k_of_one_is_greedy() -> None:
    logits = make_logits(20)
    assert tokens(logits, [SampleRow(top_k=1, position=i) for i in range(20)]) == logits.argmax(-1).tolist()


def test_ties_with_the_last_kept_are_kept() -> None:
    logits = torch.tensor([[3.0, 1.0, 1.0, 1.0, -5.0]])
    assert drawable(logits, SampleRow(top_k=2)) == {0, 1, 2, 3}
    assert drawable(logits, SampleRow(top_p=0.8)) == {0, 1, 2, 3}


def test_same_seed_same_token_whatever_else_is_in_the_batch() -> None:
    logits = make_logits(40)
    filters = [{}, {"top_p": 0.9}, {"top_k": 7}, {"min_p": 0.1}, {"temperature": 0.0}]
    rows = [SampleRow(seed=i, stream=i % 3, position=2 * i, **filters[i % 5]) for i in range(40)]
    together = tokens(logits, rows)
    alone = [tokens(logits[i : i + 1], [rows[i]])[0] for i in range(40)]
    assert together == alone
    order = list(range(40))[::-1]
    assert tokens(logits[order], [rows[i] for i in order]) == together[::-1]


def test_seed_stream_and_position_each_change_the_draws() -> None:
    logits = make_logits(1).expand(30, -1) * 0.1
    base = [SampleRow(seed=1, position=i) for i in range(30)]
    other_seed = tokens(logits, [replace(row, seed=2) for row in base])
    other_stream = tokens(logits, [replace(row, stream=1) for row in base])
    first = tokens(logits, base)
    assert first == tokens(logits, base)
    assert len({tuple(drawn) for drawn in (first, other_seed, other_stream)}) == 3
    assert len(set(first)) > 10


def test_near_zero_temperature_is_greedy() -> None:
    logits = make_logits(5)
    assert tokens(logits, [SampleRow(temperature=1e-30)] * 5) == logits.argmax(-1).tolist()


def test_penalties_bias_and_bans_follow_their_formulas() -> None:
    """Seen through greedy choice over logits built so that each rule decides."""
    row = SampleRow(temperature=0)
    base = torch.full((1, 6), -9.0)

    def choice(changes: dict[int, float], row: SampleRow) -> int:
        logits = base.clone()
        for token, value in changes.items():
            logits[0, token] = value
        return tokens(logits, [row])[0]

    repeat = replace(row, repetition_penalty=2.0, prompt_token_ids=(1, 1), output_token_ids=(2,))
    assert choice({1: 4.0, 3: 2.1}, repeat) == 3  # a prompt token, once: 4 / 2
    assert choice({1: 4.0, 3: 1.9}, repeat) == 1
    assert choice({2: -1.0, 3: -1.9}, repeat) == 3  # an output token, negative: -1 * 2
    assert choice({2: -1.0, 3: -2.1}, repeat) == 2
    present = replace(row, presence_penalty=1.5, prompt_token_ids=(3,), output_token_ids=(1, 1))
    assert choice({1: 4.0, 3: 2.6}, present) == 3  # once however often; the prompt does not count
    assert choice({1: 4.0, 3: 2.4}, present) == 1
    frequent = replace(row, frequency_penalty=0.5, output_token_ids=(1, 1, 1))
    assert choice({1: 4.0, 3: 2.6}, frequent) == 3  # 4 - 3 * 0.5
    assert choice({1: 4.0, 3: 2.4}, frequent) == 1
    assert choice({1: 4.0, 3: 1.0}, replace(row, logit_bias=((3, 3.5), (1, -0.1)))) == 3
    assert choice({1: 4.0, 3: 1.0}, replace(row, banned_token_ids=(1,), logit_bias=((1, 100.0),))) == 3


def test_a_penalty_before_any_token_changes_nothing() -> None:
    row = SampleRow(temperature=0, repetition_penalty=1.5, presence_penalty=1.0)
    logits = make_logits(1)
    assert tokens(logits, [row]) == logits.argmax(-1).tolist()


def test_the_callers_logits_stay_as_they_were() -> None:
    logits = make_logits(3)
    before = logits.clone()
    rows = [
        SampleRow(top_k=3, logprobs=2),
        SampleRow(banned_token_ids=(1,), logit_bias=((2, 5.0),)),
        SampleRow(temperature=0),
    ]
    sample(logits, rows)
    assert torch.equal(logits, before)


def test_logprobs_are_those_of_the_unmodified_distribution() -> None:
    logits = make_logits(4)
    row = SampleRow(temperature=0, logit_bias=((7, 100.0),), logprobs=3)
    drawn = sample(
        logits, [row, replace(row, logprobs=0), replace(row, logprobs=None), replace(row, logprobs=VOCAB + 9)]
    )
    exact = logits.double().log_softmax(-1)
    assert [each.token_id for each in drawn] == [7] * 4
    assert drawn[2].logprob is None
    for i, count in ((0, 3), (1, 0), (3, VOCAB)):
        told = drawn[i].logprob
        assert told is not None
        assert told.token_id == 7
        assert told.logprob == pytest.approx(float(exact[i, 7]), abs=1e-5)
        assert told.rank == 1 + int((exact[i] > exact[i, 7]).sum())
        order = exact[i].argsort(descending=True)[:count]
        assert [token for token, _ in told.top] == order.tolist()
        assert [value for _, value in told.top] == pytest.approx(exact[i, order].tolist(), abs=1e-5)


def test_processed_logprobs_are_those_that_the_token_was_drawn_by() -> None:
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(3)) * 3
    before = logits.clone()
    bias = ((4, 2.0), (9, -50.0))
    rows = [
        SampleRow(temperature=0.5, logprobs=3, processed=True),
        SampleRow(temperature=2.0, top_k=5, logprobs=VOCAB, processed=True),
        SampleRow(temperature=0.7, top_p=0.6, min_p=0.01, logit_bias=bias, logprobs=VOCAB, processed=True),
        SampleRow(temperature=0, logit_bias=bias, banned_token_ids=(1,), logprobs=VOCAB, processed=True),
        SampleRow(temperature=0.5, top_k=1, logprobs=0, processed=True),
        SampleRow(temperature=0.5, top_k=1, logprobs=1),
    ]
    drawn = sample(logits, rows)
    assert torch.equal(logits, before)
    biased = logits.clone()
    biased[2:4, 4] += 2
    biased[2:4, 9] -= 50
    biased[3, 1] = -torch.inf
    for i, row in enumerate(rows[:5]):
        told = drawn[i].logprob
        assert told is not None
        scaled = biased[i] / (row.temperature or 1)
        if row.top_k > 0:
            scaled[scaled < scaled.topk(row.top_k).values[-1]] = -torch.inf
        if row.top_p < 1:
            likeliest = scaled.softmax(0).sort(descending=True)
            kept = likeliest.indices[likeliest.values.cumsum(0) - likeliest.values < row.top_p]
            least = max(float(scaled[kept].min()), float(scaled.max()) + math.log(row.min_p))
            scaled[scaled < least] = -torch.inf
        exact = scaled.log_softmax(0)
        assert told.logprob == pytest.approx(float(exact[told.token_id]), abs=1e-5)
        assert math.isfinite(told.logprob)
        assert told.rank == int((exact > exact[told.token_id]).sum()) + 1
        for token, value in told.top:
            assert value == pytest.approx(float(exact[token]), abs=1e-5)
    raw = drawn[5].logprob
    assert drawn[4].logprob is not None
    assert drawn[4].logprob.logprob == pytest.approx(0, abs=1e-6)
    assert raw is not None
    assert raw.logprob == pytest.approx(float(logits[5].log_softmax(0).max()), abs=1e-5)


def test_prompt_logprobs_describe_the_next_tokens() -> None:
    logits, following = make_logits(5), [3, 1, 4, 1, 5]
    exact = logits.double().log_softmax(-1)
    told = prompt_logprobs(logits, following, 2)
    assert [each.logprob for each in told] == pytest.approx(
        [float(exact[i, t]) for i, t in enumerate(following)], abs=1e-5
    )
    assert [len(each.top) for each in told] == [2] * 5
    assert prompt_logprobs(logits[:0], [], 2) == []


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_broken_logits_are_named_not_sampled(poison: float) -> None:
    logits = make_logits(4)
    logits[2, 9] = poison
    with pytest.raises(InvalidLogits, match="NaN") as error:
        sample(logits, [SampleRow(temperature=0)] * 4)
    assert error.value.rows == (2,)
    with pytest.raises(InvalidLogits):
        prompt_logprobs(logits, [0] * 4, 0)


def test_a_row_with_every_token_banned_is_named() -> None:
    with pytest.raises(InvalidLogits):
        sample(make_logits(1), [SampleRow(banned_token_ids=tuple(range(VOCAB)))])


def test_only_allowed_tokens_are_drawn_and_neighbours_draw_what_they_draw_alone() -> None:
    logits = torch.randn(6, 70, generator=torch.Generator().manual_seed(3))
    allowed = np.zeros((3, 3), np.int32)  # rows 0, 2 and 5: tokens 0 and 31, 32 and 69, none but 64
    allowed[0, 0], allowed[1, 1], allowed[1, 2], allowed[2, 2] = -(2**31) + 1, 1, 1 << 5, 1
    masks = {0: allowed[0], 2: allowed[1], 5: allowed[2]}
    free = [SampleRow(seed=seed, temperature=seed % 2, logprobs=1) for seed in range(6)]
    rows = [replace(row, allowed=masks.get(i)) for i, row in enumerate(free)]
    before, alone, drawn = logits.clone(), sample(logits, free), sample(logits, rows)
    assert torch.equal(logits, before)
    assert drawn[0].token_id in (0, 31)
    assert drawn[2].token_id in (32, 69)
    assert drawn[5].token_id == 64
    assert [drawn[i] for i in (1, 3, 4)] == [alone[i] for i in (1, 3, 4)]
    (own,) = prompt_logprobs(logits[5:], [64], 1)  # as if nothing were excluded
    told = drawn[5].logprob
    assert told is not None
    assert (told.rank, told.logprob) == (own.rank, pytest.approx(own.logprob))
