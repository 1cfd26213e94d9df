"""The cost model against sums worked by hand, its fit against a known truth, and profiles."""

from pathlib import Path

import numpy as np
import pytest

from scheduler.cluster.cost.fit import Measurement, TooFewMeasurements, fit, held_out_error
from scheduler.cluster.cost.forecast import AdapterRates, Forecast, ForecastBatch
from scheduler.cluster.cost.model import AdapterLoad, CostModel, Kernel, StepLoad, features
from scheduler.cluster.cost.pace import Pace
from scheduler.cluster.cost.profile import (
    InvalidProfile,
    Lengths,
    Limits,
    Slo,
    from_json,
    operating_point,
    to_json,
)

TRUTH = (5e-3, 25e-6, 5e-6, 4e-8, 1.7e-6, 9e-9)
WHOLE_TRUTH = (9e-3, 2e-4, 1e-4, 2e-6, 2e-6, 3e-7, 4e-4, 6e-5, 7e-7, 3e-4, 24.0)
MIXED = StepLoad(
    (AdapterLoad(0, 7, 3), AdapterLoad(8, 0, 2), AdapterLoad(64, 100, 1)), 500, prompt_pairs=5078
)
PROFILES = Path(__file__).parents[3] / "scheduler/cluster/profiles"
H100 = PROFILES / "h100_llama8b.json"


@pytest.mark.parametrize(
    ("kernel", "rank_rows", "token_ranks"),
    [
        (Kernel.EXACT, 8 + 64, 2 * 8 + 101 * 64),
        (Kernel.PADDED, 64 + 64, 2 * 64 + 101 * 64),
        (Kernel.MULTI_RANK, 8 + 64, 2 * 8 + 101 * 64),
        (Kernel.FIXED, 128 + 128, 2 * 128 + 101 * 128),
    ],
)
def test_features_of_a_mixed_step(kernel: Kernel, rank_rows: float, token_ranks: float) -> None:
    rest = (2, 103, 5078, 13)
    assert features(MIXED, kernel, knee_rows=100, fixed_rank=128) == (
        1,
        107,
        6,
        500,
        rank_rows,
        token_ranks,
        *rest,
    )


def test_multi_rank_kernels_pad_prompts_but_not_decoding() -> None:
    load = StepLoad((AdapterLoad(8, 10, 1), AdapterLoad(64, 0, 1)), context_tokens=0)
    assert features(load, Kernel.MULTI_RANK)[4:6] == (64 + 64, 10 * 64 + 8 + 64)
    assert features(load, Kernel.EXACT)[4:6] == (8 + 64, 11 * 8 + 64)


def test_fixed_kernels_cost_all_ranks_alike_wherever_costs_are_forecast() -> None:
    model = CostModel(Kernel.FIXED, *WHOLE_TRUTH, fixed_rank=64)
    points = [
        operating_point(model, rank, Slo(2.0, 0.2), Lengths(100, 50), Limits(2048, 10**9)) for rank in (8, 64)
    ]
    assert points[0] == points[1]
    forecast = Forecast(model, Lengths(100, 50))
    batches = [ForecastBatch(4.0, 500.0, 4, 4 * rank, rank) for rank in (8, 64)]
    assert forecast.step_s(batches[0]) == forecast.step_s(batches[1])
    rates = [AdapterRates(np.array([0.5]), np.array([float(rank)])) for rank in (8, 64)]
    steps = [forecast.steps(forecast.features(each, 0.02, (8, 64)), (8, 64))[0] for each in rates]
    assert steps[0] == steps[1]
    exact = Forecast(model.under(Kernel.EXACT), Lengths(100, 50))
    assert exact.step_s(batches[0]) < exact.step_s(batches[1]) == pytest.approx(forecast.step_s(batches[1]))


@pytest.mark.parametrize(("kernel", "fixed_rank"), [(Kernel.FIXED, 0), (Kernel.EXACT, 64)])
def test_a_fixed_rank_goes_with_fixed_kernels_only(kernel: Kernel, fixed_rank: int) -> None:
    with pytest.raises(ValueError, match=f"fixed_rank={fixed_rank}"):
        CostModel(kernel, *TRUTH, fixed_rank=fixed_rank)


def test_base_tokens_cost_no_lora_even_under_padding() -> None:
    alone = StepLoad((AdapterLoad(0, 100, 5),), 10)
    assert features(alone, Kernel.PADDED)[4:8] == (0, 0, 0, 0)


def _steps(rng: np.random.Generator, count: int) -> list[StepLoad]:
    loads = []
    for _ in range(count):
        ranks = rng.choice([0, 8, 16, 32, 64, 128], rng.integers(1, 6))
        prompts = rng.integers(0, 400, len(ranks)) * rng.integers(0, 2, len(ranks))
        parts = [
            AdapterLoad(int(r), int(p), int(rng.integers(0, 12))) for r, p in zip(ranks, prompts, strict=True)
        ]
        pairs = int(rng.integers(1, 3) * np.sum(prompts**2))
        loads.append(StepLoad(tuple(parts), int(rng.integers(0, 100_000)), pairs))
    return loads


@pytest.mark.parametrize("kernel", list(Kernel))
def test_fit_finds_the_truth_behind_noise_and_says_how_far_off_it_is(kernel: Kernel) -> None:
    rng = np.random.default_rng(7)
    truth = CostModel(kernel, *TRUTH, fixed_rank=128 if kernel is Kernel.FIXED else 0)
    rows = [Measurement(load, truth.step_s(load) * rng.normal(1, 0.01)) for load in _steps(rng, 200)]
    found = fit(rows, kernel)
    fresh = _steps(rng, 50)
    assert all(abs(found.step_s(load) / truth.step_s(load) - 1) < 0.03 for load in fresh)
    error = held_out_error(rows, kernel)
    assert 0.004 < error.median < error.mean < 0.02
    assert error.mean < error.p95 <= error.worst


def test_fit_goes_through_the_mean_of_steps_that_chance_makes_longer_and_shorter() -> None:
    rng = np.random.default_rng(11)
    truth = CostModel(Kernel.EXACT, *TRUTH)
    rows = [Measurement(load, truth.step_s(load) * rng.lognormal(0, 0.3)) for load in _steps(rng, 800)]
    found = fit(rows, Kernel.EXACT)
    mean = np.mean([row.step_s / found.step_s(row.load) for row in rows])
    assert mean == pytest.approx(1, abs=0.02), "weighted by what was measured, it would be 1.21"


def test_fit_finds_every_coefficient_and_the_knee_where_nothing_is_in_the_way() -> None:
    truth = CostModel(Kernel.EXACT, *WHOLE_TRUTH)
    loads = _steps(np.random.default_rng(9), 300)
    found = fit([Measurement(load, truth.step_s(load)) for load in loads], Kernel.EXACT)
    assert found.coefficients == pytest.approx(truth.coefficients, rel=1e-6)
    assert found.knee_rows == truth.knee_rows


def test_fit_never_goes_negative_where_a_feature_is_free() -> None:
    rng = np.random.default_rng(8)
    truth = CostModel(Kernel.EXACT, 5e-3, 25e-6, 0.0, 0.0, 1.7e-6, 0.0)
    rows = [Measurement(load, truth.step_s(load) * rng.normal(1, 0.05)) for load in _steps(rng, 40)]
    assert min(fit(rows, Kernel.EXACT).coefficients) >= 0


def test_fit_refuses_too_few_rows() -> None:
    with pytest.raises(TooFewMeasurements, match="rows=1"):
        fit([Measurement(MIXED, 0.1)], Kernel.EXACT)


def test_the_operating_point_is_the_most_that_keeps_the_slo() -> None:
    model, slo = CostModel(Kernel.EXACT, *TRUTH), Slo(ttft_s=2.0, tbt_s=0.05)
    lengths, limits = Lengths(1000.0, 250.0), Limits(2048, 10**9)
    rate = operating_point(model, 64, slo, lengths, limits)
    step_s = slo.tbt_s
    sequences = rate / 5 * step_s
    by_hand = 5e-3 + sequences * (4 * 25e-6 + 5e-6 + 1125 * 4e-8 + 64 * 1.7e-6 + 64 * 5 * 9e-9)
    assert by_hand == pytest.approx(step_s)


def test_a_steady_step_is_charged_for_everything() -> None:
    model, lengths = CostModel(Kernel.EXACT, *WHOLE_TRUTH), Lengths(100.0, 50.0)
    rate = operating_point(model, 64, Slo(10.0, 0.2), lengths, Limits(2048, 10**9))
    sequences = rate / 3 * 0.2
    load = (1, 2 * sequences, sequences, 125 * sequences, 64 * sequences, 192 * sequences, sequences)
    more = (3 * sequences, 2 * sequences * 101 / 2, 3 * sequences - 24)
    assert sum(a * b for a, b in zip(model.coefficients, (*load, *more), strict=True)) == pytest.approx(0.2)


def test_operating_points_fall_with_rank_and_rise_with_patience() -> None:
    model, lengths, limits = CostModel(Kernel.EXACT, *TRUTH), Lengths(1000.0, 250.0), Limits(2048, 10**9)
    rates = [operating_point(model, rank, Slo(2.0, 0.05), lengths, limits) for rank in (8, 16, 32, 64, 128)]
    assert rates == sorted(rates, reverse=True)
    assert operating_point(model, 8, Slo(2.0, 0.1), lengths, limits) > rates[0]
    assert operating_point(model, 8, Slo(0.04, 0.05), lengths, limits) < rates[0], (
        "first token bounds the step"
    )
    assert operating_point(model, 8, Slo(2.0, 0.05), lengths, Limits(2048, 12_500)) < rates[0], (
        "K/V bounds it"
    )


def test_an_slo_below_an_empty_step_is_refused() -> None:
    with pytest.raises(InvalidProfile, match="loosen the SLO"):
        operating_point(
            CostModel(Kernel.EXACT, *TRUTH), 8, Slo(2.0, 0.004), Lengths(100, 100), Limits(2048, 10**6)
        )


def test_the_h100_profile_says_that_it_is_derived_and_matches_the_roofline() -> None:
    profile = from_json(H100.read_text())
    assert profile.provenance == "derived"
    assert from_json(to_json(profile)) == profile
    model = profile.model(Kernel.EXACT)
    lora_s = model.rank_row_s * 32 * 8
    assert lora_s == pytest.approx(0.45e-3, rel=0.02), "32 sequences, each its own rank-8 adapter"
    assert model.rank_row_s * 32 * 128 == pytest.approx(7.16e-3, rel=0.02)
    points = profile.operating_points(Kernel.PADDED, (8, 16, 32, 64, 128))
    assert points.at(8) > 2 * points.at(128)


def test_the_cpu_profile_says_that_it_was_measured_and_how_far_off_it_is() -> None:
    profile = from_json((PROFILES / "cpu_100m.json").read_text())
    assert profile.provenance == "measured"
    assert "held-out error (five folds): median" in profile.note
    assert from_json(to_json(profile)) == profile
    exact, padded = (profile.operating_points(kernel, (8, 128)) for kernel in (Kernel.EXACT, Kernel.PADDED))
    assert exact.at(8) > 1.5 * exact.at(128)
    assert exact == padded, "nothing is padded where there is one rank only"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("{}", "lacks the field 'models'"),
        ('{"models": 3}', "wrong kind"),
        (
            '{"models": [], "hardware": "", "base_model": "", "provenance": "", "note": "", "slo": {"x": 1}}',
            "wrong kind",
        ),
    ],
)
def test_a_broken_profile_is_refused_with_the_reason(text: str, message: str) -> None:
    with pytest.raises(InvalidProfile, match=message):
        from_json(text)


def test_a_pace_scales_each_part_of_a_step_by_itself() -> None:
    model = CostModel(Kernel.EXACT, *WHOLE_TRUTH)
    whole = model.step_s(MIXED)
    parts = [
        Pace(*(2.0 if at == part else 1.0 for at in range(3))).of(model).step_s(MIXED) for part in range(3)
    ]
    assert min(parts) > whole
    assert sum(parts) - 3 * whole == pytest.approx(whole), "every second belongs to one part"
    assert Pace(3.0, 3.0, 3.0).of(model).step_s(MIXED) == pytest.approx(3 * whole)
    idle = StepLoad((AdapterLoad(0, 0, 4),), 100)
    assert Pace(1.0, 9.0, 9.0).of(model).step_s(idle) == pytest.approx(model.step_s(idle))


def test_a_rounded_pace_is_one_of_few_and_near() -> None:
    rounded = {Pace(1.0, factor, 1.0).rounded() for factor in np.linspace(1.0, 4.0, 500)}
    assert len(rounded) < 35
    assert Pace(0.3, 1.0, 7.0).rounded().lora == pytest.approx(7.0, rel=0.026)
    assert Pace().rounded() == Pace()


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf")])
def test_a_pace_that_is_no_factor_is_refused(factor: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        Pace(lora=factor)
