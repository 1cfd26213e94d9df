"""Drawing on a device against model/sampling.py on the CPU: for the same logits and parameters, the same tokens."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.sampling.device import DeviceSampler
from model.sampling.sample import SampleRow, sample
from tests.kernels.interpreter import DEVICE, RUNS_TRITON

pytestmark = pytest.mark.skipif(not RUNS_TRITON, reason="neither a CUDA device nor TRITON_INTERPRET=1")

VOCAB = 300  # not a power of two


def make_logits(rows: int, vocab: int = VOCAB, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def drawn(logits: Tensor, rows: list[SampleRow]) -> tuple[list[int], list[int]]:
    """The device's tokens and the rows it calls unsound."""
    sampler = DeviceSampler(len(rows) + 2, DEVICE)
    sampler.refill(rows)
    changed = logits.clone().to(DEVICE)
    sampler.adjust(changed, rows)
    sampler.draw(changed)
    return sampler.fetch(len(rows)).tokens()


def check(logits: Tensor, rows: list[SampleRow]) -> None:
    assert drawn(logits, rows) == ([each.token_id for each in sample(logits, rows)], [])


def test_greedy_takes_the_largest_and_the_lowest_of_equals_on_triton() -> None:
    logits = make_logits(4)
    logits[1] = 0.0
    logits[2, 17] = logits[2, 250] = 50.0
    check(logits, [SampleRow(temperature=0)] * 4)


@pytest.mark.parametrize(
    "row",
    [
        SampleRow(),
        SampleRow(temperature=0.3),
        SampleRow(temperature=1e-30),
        SampleRow(top_k=1),
        SampleRow(top_k=7),
        SampleRow(top_k=VOCAB),
        SampleRow(top_p=0.7),
        SampleRow(top_p=0.01),
        SampleRow(min_p=0.1),
        SampleRow(min_p=1.0),
        SampleRow(temperature=1.7, top_k=40, top_p=0.9, min_p=0.02),
    ],
    ids=[
        "plain",
        "cold",
        "coldest",
        "top_k of one",
        "top_k",
        "top_k of all",
        "top_p",
        "narrow",
        "min_p",
        "max_p",
        "all",
    ],
)
def test_one_filter_at_a_time_on_triton(row: SampleRow) -> None:
    check(make_logits(6), [replace(row, seed=2**40 + 3, stream=i % 2, position=i) for i in range(6)])


def test_filters_keep_exactly_what_the_cpu_keeps_on_triton() -> None:
    """Few tokens and many draws: a token that only one of the two may draw would show."""
    logits = make_logits(1, vocab=9)
    for row in (SampleRow(top_k=3), SampleRow(top_p=0.8), SampleRow(temperature=2.0, top_k=5, top_p=0.6)):
        check(logits.expand(40, -1), [replace(row, position=i) for i in range(40)])


def test_ties_and_excluded_tokens_on_triton() -> None:
    logits = torch.tensor([[3.0, 1.0, 1.0, 1.0, -5.0], [-math.inf, 2.0, -math.inf, 2.0, 1.0]])
    for row in (SampleRow(top_k=2), SampleRow(top_p=0.8), SampleRow(top_k=4), SampleRow(top_p=0.999)):
        for position in range(8):
            check(logits, [replace(row, position=position)] * 2)


def test_flat_and_wide_distributions_on_triton() -> None:
    """More tokens than a tile; the nucleus takes most of them."""
    logits = make_logits(3, vocab=20_000) * 0.01
    check(logits, [SampleRow(), SampleRow(top_p=0.9, position=1), SampleRow(top_k=5000, position=2)])


@pytest.mark.parametrize("spread", [0.8, 3.0])
def test_edges_among_the_few_likeliest_and_beyond_on_triton(spread: float) -> None:
    """A vocabulary of more tokens than are looked at first: the edge is among those, or below them."""
    logits = make_logits(1, vocab=12_000) * spread / 3
    rows = [
        SampleRow(top_k=40),
        SampleRow(top_k=6000),
        SampleRow(top_p=0.5),
        SampleRow(top_p=0.9999),
        SampleRow(min_p=0.001),
        SampleRow(min_p=1e-12),
        SampleRow(top_k=6000, top_p=0.3),
        SampleRow(top_k=200, top_p=0.99, min_p=0.01),
    ]
    check(logits.expand(8, -1).clone(), [replace(row, position=i) for i, row in enumerate(rows)])


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**64 - 1),
    temperature=st.sampled_from([0.0, 0.2, 1.0, 3.0]),
    top_k=st.integers(0, 60),
    top_p=st.floats(0.05, 1.0),
    min_p=st.sampled_from([0.0, 0.01, 0.5]),
)
def test_any_parameters_on_triton(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    row = SampleRow(temperature, top_k, top_p, min_p, seed=seed, position=seed % 1000)
    check(make_logits(2, vocab=50, seed=seed % 97), [row, replace(row, stream=1)])


def test_penalties_biases_and_bans_on_triton() -> None:
    row = SampleRow(
        temperature=0.8,
        repetition_penalty=1.3,
        presence_penalty=0.4,
        frequency_penalty=0.2,
        logit_bias=((5, 2.0), (9, -100.0)),
        prompt_token_ids=(1, 2, 3, 3),
        output_token_ids=(3, 7, 7, 8),
        banned_token_ids=(0, 1),
    )
    rows = [replace(row, position=i) for i in range(5)] + [SampleRow(position=9), replace(row, temperature=0)]
    check(make_logits(7, vocab=12), rows)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_unsound_rows_are_named_and_the_others_drawn_on_triton(poison: float) -> None:
    logits = make_logits(4)
    logits[2] = poison if poison < 0 else logits[2]
    logits[2, 299] = poison
    rows = [SampleRow(position=i, top_p=0.9) for i in range(4)]
    tokens, unsound = drawn(logits, rows)
    assert unsound == [2]
    sound = [0, 1, 3]
    expected = sample(logits[sound], [rows[i] for i in sound])
    assert [tokens[i] for i in sound] == [each.token_id for each in expected]
    assert tokens[2] == 0


def test_a_row_with_every_token_banned_is_named_on_triton() -> None:
    logits = make_logits(1, vocab=5)
    _, unsound = drawn(logits, [SampleRow(banned_token_ids=tuple(range(5)))])
    assert unsound == [0]


def test_positions_advance_on_the_device_on_triton() -> None:
    """Drawn again and again without a refill, a row draws what it would at the next positions."""
    logits = make_logits(3)
    rows = [SampleRow(seed=i, position=10 * i) for i in range(3)]
    sampler = DeviceSampler(3, DEVICE)
    sampler.refill(rows)
    for step in range(3):
        tokens = sampler.draw(logits.to(DEVICE), advance=True).tolist()
        expected = sample(logits, [replace(row, position=row.position + step) for row in rows])
        assert tokens == [each.token_id for each in expected]


def test_bfloat16_logits_draw_as_their_float32_on_triton() -> None:
    logits = make_logits(3).bfloat16()
    rows = [SampleRow(position=i, top_k=9) for i in range(3)]
    sampler = DeviceSampler(3, DEVICE)
    sampler.refill(rows)
    sampler.draw(logits.to(DEVICE))
    assert sampler.fetch(3).tokens()[0] == [each.token_id for each in sample(logits.float(), rows)]
