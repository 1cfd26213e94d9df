"""Forecast steps against sums by hand, limits that must hold, and a simulated batch."""

from dataclasses import replace

import numpy as np
import pytest

from scheduler.cluster.cost.forecast import AdapterRates, Forecast, ForecastBatch
from scheduler.cluster.cost.model import AdapterLoad, CostModel, Kernel, StepLoad
from scheduler.cluster.cost.pace import Pace
from scheduler.cluster.cost.profile import Lengths

MODEL = CostModel(Kernel.PADDED, 5e-3, 25e-6, 5e-6, 4e-8, 1.7e-6, 9e-9)
LENGTHS = Lengths(1000, 200)
LEVELS = (8, 128)


def _step_s(kernel: Kernel, rates: list[float], ranks: list[int], slowdown: float = 1.0) -> float:
    """The fixed point, for one node."""
    forecast = Forecast(MODEL.under(kernel), LENGTHS)
    adapters, step_s = AdapterRates(np.array(rates), np.array(ranks, dtype=np.float64)), 5e-3
    for _ in range(30):
        sums = forecast.features(adapters, step_s, LEVELS).sum(1, keepdims=True)
        step_s = float(forecast.steps(sums, LEVELS, slowdown)[0])
    return step_s


def test_an_idle_node_steps_in_the_base_time_times_its_slowdown() -> None:
    assert _step_s(Kernel.EXACT, [1e-9], [8]) == pytest.approx(5e-3, rel=1e-4)
    assert _step_s(Kernel.EXACT, [1e-9], [8], slowdown=3.0) == pytest.approx(15e-3, rel=1e-4)


def test_one_popular_adapter_costs_its_requests_and_one_reading_of_it() -> None:
    """By hand: own = 5 ms + 8·1.7 µs; a request takes 25 + 1 + 200·1100·40 ns = 34.8 ms and 1200·8·9 ns."""
    own, request_s = 5e-3 + 8 * 1.7e-6, 0.025 + 0.001 + 0.0088 + 1200 * 8 * 9e-9
    assert _step_s(Kernel.EXACT, [12.0], [8]) == pytest.approx(own / (1 - 12 * request_s), rel=1e-3)


def test_a_rare_large_rank_pads_only_the_batches_it_is_in() -> None:
    rates = [1.0] * 6
    small, large = _step_s(Kernel.PADDED, rates, [8] * 6), _step_s(Kernel.PADDED, rates, [8] * 5 + [128])
    rare = _step_s(Kernel.PADDED, [1.0] * 6 + [1e-3], [8] * 6 + [128])
    assert small < rare < small + 0.1 * (large - small)


def test_padding_costs_most_exact_least_and_multi_rank_is_between() -> None:
    rates, ranks = [0.5] * 16, [8, 128] * 8
    exact, multi, padded = (
        _step_s(kernel, rates, ranks) for kernel in (Kernel.EXACT, Kernel.MULTI_RANK, Kernel.PADDED)
    )
    assert exact < multi < padded


def test_steps_grow_with_every_request_and_stay_finite_beyond_what_a_node_can_take() -> None:
    found = [_step_s(Kernel.PADDED, [rate], [8]) for rate in (1, 10, 20, 28, 30, 60, 600)]
    assert found == sorted(found)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("kernel", list(Kernel))
def test_who_is_in_a_batch_is_forecast_as_chance_has_it(kernel: Kernel) -> None:
    """Oracle: batches drawn adapter by adapter from Poisson occupancies, charged by the cost model."""
    rng = np.random.default_rng(0)
    rates, ranks = rng.pareto(1.5, 30) * 0.1 + 0.01, rng.choice([8, 128], 30)
    forecast, step_s = Forecast(replace(MODEL.under(kernel, 128), token_rank_s=0.0), LENGTHS), 0.02
    sums = forecast.features(AdapterRates(rates, ranks.astype(np.float64)), step_s, LEVELS).sum(
        1, keepdims=True
    )
    free = Lengths(1e-9, 1e-9)
    own = Forecast(replace(forecast.model, prefill_token_s=0, decode_sequence_s=0, context_token_s=0), free)
    drawn = []
    for _ in range(4000):
        decoding = rng.poisson(rates * LENGTHS.output_tokens * step_s)
        reading = rng.poisson(rates * step_s)
        load = tuple(
            AdapterLoad(int(rank), int(p > 0), int(d))
            for rank, p, d in zip(ranks, reading, decoding, strict=True)
            if p or d
        )
        drawn.append(own.model.step_s(StepLoad(load, 0)))
    assert float(own.steps(sums, LEVELS)[0]) == pytest.approx(np.mean(drawn), rel=0.06)


def test_a_batch_that_grows_by_a_large_rank_takes_longer_where_kernels_pad() -> None:
    before, after = ForecastBatch(20, 20_000, 20, 160, 8), ForecastBatch(20, 20_000, 21, 288, 128)
    for kernel, least in ((Kernel.PADDED, 4e-3), (Kernel.EXACT, 1e-4)):
        forecast = Forecast(MODEL.under(kernel), LENGTHS)
        assert forecast.step_s(after) - forecast.step_s(before) > least
    assert forecast.step_s(after) - forecast.step_s(before) < 1e-3


@pytest.mark.parametrize("kernel", list(Kernel))
def test_a_batch_costs_what_the_model_says_of_such_a_step(kernel: Kernel) -> None:
    """Decoding of mixed ranks; then one rank that decodes, and reads two tokens for each that it draws."""
    model = replace(MODEL.under(kernel, 128), adapter_s=3e-4, adapter_token_s=2e-5)
    mixed = StepLoad(tuple(AdapterLoad(rank, 0, 1) for rank in (8, 16, 64, 128)), 5000)
    decoding = Forecast(model, Lengths(0, 200))
    without_rows = replace(model, adapter_token_s=0)
    assert decoding.step_s(ForecastBatch(4, 5000, 4, 216, 128)) == pytest.approx(without_rows.step_s(mixed))
    alike = StepLoad(tuple(AdapterLoad(32, 2, 1) for _ in range(6)), 900)
    both = Forecast(model, Lengths(100, 50)).step_s(ForecastBatch(6, 900, 6, 192, 32))
    assert both == pytest.approx(model.step_s(alike) - 6 * model.adapter_token_s)


def test_forecasts_of_other_nodes_are_kept_by_kernel_and_rounded_pace() -> None:
    forecast = Forecast(MODEL, LENGTHS, others=(replace(MODEL, kernel=Kernel.EXACT, base_s=7e-3),))
    assert forecast.of(None, Pace()) is forecast.of(Kernel.PADDED, Pace(1.01)) is forecast
    exact = forecast.of(Kernel.EXACT, Pace(2.0, 1.0, 3.0))
    assert exact.model.kernel is Kernel.EXACT
    assert exact.model.base_s == pytest.approx(14e-3, rel=0.03), "of the profile's own model of these kernels"
    assert exact.model.rank_row_s == pytest.approx(3 * MODEL.rank_row_s, rel=0.03)
    assert forecast.of(Kernel.EXACT, Pace(2.01, 1.0, 3.01)) is exact
    near = [forecast.of(Kernel.EXACT, Pace(2.0 + at * 1e-6)) for at in range(2000)]
    assert len({id(each) for each in near[-100:]}) == 1
