"""Workloads: traces, catalogues, and how popularity changes over a run."""

from collections import Counter
from collections.abc import Sequence
from itertools import takewhile

import numpy as np
import pytest

from scheduler.blocks import block_digest, chain_seed
from scheduler.sim.workload.adapters import (
    EQUAL,
    MIXES,
    SHIFTING,
    SKEWED,
    InvalidCatalogue,
    RankMix,
    catalogue,
    rank_mix,
    read_catalogue,
)
from scheduler.sim.workload.popularity import (
    Diurnal,
    FlashCrowd,
    InvalidLaw,
    Known,
    Popularity,
    PowerLaw,
    Shifting,
    ZipfLaw,
    assigned,
    chosen,
    over,
    popularity,
)
from scheduler.sim.workload.prompt import DRAWN_TOKEN_ID, PromptShape, TextRun
from scheduler.sim.workload.trace import Call, InvalidTrace, busiest_s, paced, poisson, read_trace

TRACE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319600,3180,8
2023-11-16 18:17:03.9899600,110,0
"""
RANKS = np.array([ref.rank for ref in catalogue(100, EQUAL)])
LAWS: list[Popularity] = [
    PowerLaw(0.3),
    PowerLaw(1.0),
    ZipfLaw(0.8),
    ZipfLaw(1.2),
    Known((0.5,) + (0.5 / 99,) * 99),
    Shifting(PowerLaw(0.3)),
    Diurnal(PowerLaw(0.3)),
    FlashCrowd(PowerLaw(0.3)),
    FlashCrowd(Diurnal(Shifting(PowerLaw(0.5)))),
]


def test_a_trace_is_read_in_order_from_zero() -> None:
    calls = read_trace(TRACE)
    assert [(call.prompt_tokens, call.output_tokens) for call in calls] == [(4808, 10), (110, 1), (3180, 8)]
    assert [call.arrival_s for call in calls] == pytest.approx([0.0, 0.01, 0.052])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no rows"),
        ("TIMESTAMP,ContextTokens\n2023-11-16 18:17:03.9,4\n", "line 1 lacks .*GeneratedTokens"),
        (TRACE + "yesterday,1,1\n", "line 5, column TIMESTAMP: found 'yesterday': give a time"),
        (TRACE + "\n2023-11-16 18:17:05,abc,1\n", "line 6, column ContextTokens: found 'abc': give a whole"),
        (TRACE + "2023-11-16 18:17:05,1\n", "line 5, column GeneratedTokens: found nothing: give a whole"),
        (TRACE + "2023-11-16 18:17:05,-1,1\n", "line 5, column ContextTokens: found '-1': .* from 1 to"),
        (TRACE + "2023-11-16 18:17:05,0,1\n", "line 5, column ContextTokens: found '0': .* from 1 to"),
        (TRACE + "2023-11-16 18:17:05,1,-1\n", "line 5, column GeneratedTokens: found '-1': .* from 0 to"),
    ],
)
def test_a_broken_trace_is_refused(text: str, says: str) -> None:
    with pytest.raises(InvalidTrace, match=says):
        read_trace(text)


def _calls(*times: float) -> tuple[Call, ...]:
    return tuple(Call(at, 10 * (number + 1), 1) for number, at in enumerate(times))


def test_pacing_keeps_lengths_and_the_shape_of_bursts() -> None:
    """Six calls in 11 s, gaps 1 2 3 4 1, taken four at a time over 20 s: gaps doubled where four gaps are 10 s."""
    calls = _calls(0.0, 1.0, 3.0, 6.0, 10.0, 11.0)
    made = paced(calls, 0.2, 20.0)
    assert [call.arrival_s for call in made] == pytest.approx([0.0, 2.0, 6.0, 12.0])
    assert [call.prompt_tokens for call in made] == [10, 20, 30, 40]


def test_pacing_goes_round_the_end_of_the_trace() -> None:
    calls = _calls(0.0, 1.0, 3.0, 6.0, 10.0, 11.0)
    made = paced(calls, 0.3, 10.0, first=4)
    assert [call.prompt_tokens for call in made] == [50, 60, 10]
    assert [call.arrival_s for call in made] == sorted(call.arrival_s for call in made)
    assert made[0].arrival_s == 0.0
    assert made[-1].arrival_s < 10.0


def test_pacing_goes_round_the_trace_as_often_as_it_takes() -> None:
    made = paced(_calls(0.0, 1.0, 3.0, 6.0), 1.0, 10.0, first=1)
    assert [call.prompt_tokens for call in made] == [20, 30, 40, 10, 20, 30, 40, 10, 20, 30]
    assert [call.arrival_s for call in made] == sorted(call.arrival_s for call in made)


def test_pacing_refuses_a_rate_without_a_call() -> None:
    with pytest.raises(InvalidTrace, match="rate=0 over seconds=20"):
        paced(_calls(0.0, 1.0), 0.0, 20.0)


def test_the_busiest_part_of_a_trace_is_found() -> None:
    calls = [Call(float(at), 1000 if 40 <= at < 50 else 10, 1) for at in range(100)]
    assert busiest_s(calls, 10.0) == 40.0
    assert busiest_s(calls, 1000.0) == 0.0


def test_poisson_traffic_has_its_rate_and_lengths() -> None:
    calls = poisson(50.0, 100.0, (300, 40), np.random.default_rng(1))
    assert len(calls) == pytest.approx(5000, rel=0.05)
    assert np.mean([call.prompt_tokens for call in calls]) == pytest.approx(300, rel=0.06)
    assert np.mean([call.output_tokens for call in calls]) == pytest.approx(40, rel=0.06)
    assert [call.arrival_s for call in calls] == sorted(call.arrival_s for call in calls)


@pytest.mark.parametrize("mix", [*MIXES.values(), rank_mix("4:1,256:3")], ids=lambda mix: mix.name)
def test_a_catalogue_has_the_ranks_of_its_mix_early_and_late(mix: RankMix) -> None:
    refs = catalogue(200, mix)
    assert len(set(refs)) == 200
    for part in (refs, refs[:100], refs[100:]):
        counts = Counter(ref.rank for ref in part)
        assert all(abs(counts[rank] - share * len(part)) <= 1 for rank, share in mix.parts)


@pytest.mark.parametrize("text", ["", "even", "8", "8:x", "8:0", "0:1", "8:-1,16:2"])
def test_a_mix_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(InvalidCatalogue, match="ranks="):
        rank_mix(text)


@pytest.mark.parametrize(
    "text",
    [
        "name,rank,bytes,share\na,8,100,3\nb,16,,1\n",
        "share,name,bytes,rank\n3,a,100,8\n1,b,,16\n",
        "# adapters\na,8,100,3\nb,16,,1\n",
        '[{"name": "a", "rank": 8, "bytes": 100, "share": 3}, {"name": "b", "rank": 16, "share": 1}]',
    ],
)
def test_a_list_of_adapters_is_read_in_any_of_its_forms(text: str) -> None:
    found = read_catalogue(text, bytes_per_rank=2)
    assert [(ref.name, ref.rank, ref.nbytes) for ref in found.adapters] == [("a", 8, 100), ("b", 16, 32)]
    assert found.shares == (0.75, 0.25)


def test_plain_lines_need_only_a_name_and_a_rank() -> None:
    found = read_catalogue("a 8\nb 64\n", bytes_per_rank=2)
    assert [(ref.name, ref.rank, ref.nbytes) for ref in found.adapters] == [("a", 8, 16), ("b", 64, 128)]
    assert found.shares is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("a\n", "adapter 1"),
        ("a,eight\n", r"adapter 1 \('a'\), rank: found 'eight': give a whole number"),
        ("rank\n8\n", "adapter 1.*: give"),
        ("name,size\na,8\n", r"adapter 1 \('a'\), rank: found nothing: give"),
        ("a,8,much\n", "bytes: found 'much': give"),
        ("a,8,1,much\n", "share: found 'much': give"),
        ("a,0\n", "'a'.*1 or more"),
        ("a,8\na,16\n", "'a' is listed twice"),
        ("a,8,,1\nb,8\n", "all or none"),
        ("a,8,,0\n", "all or none"),
        ("[1]", '"name"'),
        ("[", "not JSON"),
    ],
)
def test_a_list_that_cannot_be_read_is_refused(text: str, says: str) -> None:
    with pytest.raises(InvalidCatalogue, match=says):
        read_catalogue(text)


@pytest.mark.parametrize("at", [0.0, 0.3, 0.5, 0.99])
@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_shares_are_shares_at_any_time(law: Popularity, at: float) -> None:
    weights = law.weights(RANKS, at)
    assert weights.shape == (100,)
    assert weights.min() >= 0
    assert weights.sum() == pytest.approx(1.0)


@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_popularity_follows_the_power_law(alpha: float) -> None:
    """P(index < k) = (k / count)^alpha."""
    times = np.linspace(0, 1, 20_000, endpoint=False)
    drawn = chosen(PowerLaw(alpha), RANKS, times, np.random.default_rng(0))
    for k in (1, 10, 50):
        assert np.mean(drawn < k) == pytest.approx((k / 100) ** alpha, abs=0.015)


@pytest.mark.parametrize(
    ("law", "first"), [(ZipfLaw(0.8), 0.1229), (ZipfLaw(1.2), 0.2775), (PowerLaw(0.3), 0.2512)]
)
def test_the_first_of_a_hundred_adapters_has_the_part_that_its_law_says(
    law: Popularity, first: float
) -> None:
    weights = law.weights(RANKS, 0.0)
    assert weights[0] == pytest.approx(first, rel=0.01)
    assert list(weights) == sorted(weights, reverse=True)
    if isinstance(law, ZipfLaw):
        assert weights[0] / weights[9] == pytest.approx(10**law.exponent)


def test_the_hot_rank_moves_from_low_to_high() -> None:
    """At the start 70 % and its part of the rest go to rank 8, at the end to 128; half-way the middle is hot."""
    law = Shifting(PowerLaw(0.3), hot=0.7)
    base = PowerLaw(0.3).weights(RANKS, 0.0)
    for at, rank in ((0.0, 8), (0.5, 32), (1.0, 128)):
        mine = rank == RANKS
        assert law.weights(RANKS, at)[mine].sum() == pytest.approx(0.7 + 0.3 * base[mine].sum())
    hottest = [int(RANKS[np.argmax(law.weights(RANKS, at / 100))]) for at in range(100)]
    assert hottest == sorted(hottest)


def test_a_flash_crowd_takes_its_part_in_its_window_only() -> None:
    law = FlashCrowd(PowerLaw(1.0), 7, (0.4, 0.6), 0.6)
    drawn = chosen(law, RANKS, np.linspace(0, 1, 20_000, endpoint=False), np.random.default_rng(2))
    inside = drawn[8000:12000]
    assert np.mean(inside == 7) == pytest.approx(0.604, abs=0.03)
    assert np.mean(np.concatenate([drawn[:8000], drawn[12000:]]) == 7) == pytest.approx(0.01, abs=0.005)


def test_over_a_day_every_adapter_swings_around_its_share() -> None:
    law, base = Diurnal(PowerLaw(1.0), swing=0.9), PowerLaw(1.0).weights(RANKS, 0.0)
    day = np.array([law.weights(RANKS, at / 200) for at in range(200)])
    assert day.mean(0) == pytest.approx(base, rel=0.05)
    assert np.all(day.max(0) > 1.8 * base)
    assert np.all(day.min(0) < 0.2 * base)


def test_the_same_seed_draws_the_same_workload() -> None:
    refs = catalogue(50, SHIFTING)

    def drawn(seed: int) -> list[str]:
        rng = np.random.default_rng(seed)
        calls = poisson(20.0, 10.0, (30, 4), rng)
        return [each.adapter.name for each in assigned(calls, refs, over(PowerLaw(0.3), SHIFTING), rng)]

    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)


def test_only_a_mix_that_shifts_moves_the_hot_rank() -> None:
    assert over(PowerLaw(0.3), SKEWED) == PowerLaw(0.3)
    assert over(PowerLaw(0.3), SHIFTING) == Shifting(PowerLaw(0.3))


@pytest.mark.parametrize(
    ("text", "law"),
    [
        ("uniform", PowerLaw(1.0)),
        ("power", PowerLaw(0.3)),
        ("zipf", ZipfLaw(1.0)),
        ("zipf:1.2", ZipfLaw(1.2)),
        ("power:0.5", PowerLaw(0.5)),
        ("diurnal:0.5", Diurnal(PowerLaw(0.5))),
        ("flash", FlashCrowd(PowerLaw(0.3))),
    ],
)
def test_laws_go_by_name(text: str, law: Popularity) -> None:
    assert popularity(text) == law


@pytest.mark.parametrize(
    "text",
    ["", "pareto", "zipf:0", "zipf:x", "zipf:9", "power:", "power:x", "power:0", "power:2", "uniform:0.3"],
)
def test_a_law_that_cannot_be_read_is_refused(text: str) -> None:
    if text == "power:":
        assert popularity(text) == PowerLaw(0.3)
        return
    with pytest.raises(InvalidLaw, match=r"popularity=.*: give .*ALPHA in"):
        popularity(text)


def _matching_tokens(one: Sequence[int], other: Sequence[int], size: int = 16) -> int:
    """Count the tokens of the blocks that a prefix cache of blocks of `size` would share."""

    def digests(ids: Sequence[int]) -> list[bytes]:
        found = [chain_seed("adapter")]
        for start in range(0, len(ids) - size + 1, size):
            found.append(block_digest(found[-1], ids[start : start + size]))
        return found[1:]

    same = takewhile(lambda pair: pair[0] == pair[1], zip(digests(one), digests(other), strict=False))
    return size * len(list(same))


def test_prompts_share_the_blocks_of_what_they_have_in_common_and_no_others() -> None:
    system, one, other = TextRun(2, 40), TextRun(3, 30), TextRun(4, 30)
    first = PromptShape((system, one)).token_ids(70, own_id=8)
    turn = PromptShape((system, one)).then(TextRun(DRAWN_TOKEN_ID, 20), other).token_ids(120, own_id=9)
    stranger = PromptShape((system, other)).token_ids(70, own_id=10)
    own = PromptShape().token_ids(70, own_id=11)
    assert [len(each) for each in (first, turn, stranger, own)] == [70, 120, 70, 70]
    assert _matching_tokens(first, turn) == 64
    assert _matching_tokens(first, stranger) == _matching_tokens(turn, stranger) == 32
    assert _matching_tokens(first, own) == 0
    assert set(own) == {11}
    assert set(turn[70:90]) == {DRAWN_TOKEN_ID}
