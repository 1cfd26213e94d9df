"""Demand is projected well on drifts whose truth is known."""

import numpy as np
import pytest

from lora.adapter import AdapterRef
from scheduler.cluster.coordinator.demand import DemandOptions, DemandTracker
from tests.scheduler.cluster.lossy import adapter

WINDOW_S = 10.0
A, B = adapter("a"), adapter("b")


def _feed(tracker: DemandTracker, ref: AdapterRef, rates: list[float], first_window: int = 0) -> float:
    """One second at a time, `rates` in tokens/s by window; returns the end of the last window."""
    for at, rate in enumerate(rates):
        for second in range(int(WINDOW_S)):
            tracker.observe(ref, round(rate), (first_window + at) * WINDOW_S + second)
    return (first_window + len(rates)) * WINDOW_S


def _tracker(*refs: AdapterRef) -> DemandTracker:
    tracker = DemandTracker(DemandOptions(window_s=WINDOW_S))
    for ref in refs:
        tracker.add(ref)
    return tracker


def test_steady_demand_is_projected_as_it_is() -> None:
    tracker = _tracker(A)
    end = _feed(tracker, A, [100.0] * 12)
    assert tracker.project(end).tokens_per_s[A] == pytest.approx(100.0, rel=0.02)


def test_a_ramp_is_foreseen_and_does_not_lag_like_the_last_window() -> None:
    tracker = _tracker(A)
    ramp = [100.0 + 20 * at for at in range(15)]
    end = _feed(tracker, A, ramp)
    truth_ahead = ramp[-1] + 20 * 2
    assert abs(tracker.project(end).tokens_per_s[A] - truth_ahead) < abs(ramp[-1] - truth_ahead)


def test_noise_is_smoothed_below_the_error_of_repeating_the_last_window() -> None:
    rng = np.random.default_rng(3)
    tracker = _tracker(A)
    rates = [float(rate) for rate in np.maximum(0, rng.normal(500, 120, 60))]
    ours, naive = [], []
    for at, rate in enumerate(rates):
        end = _feed(tracker, A, [rate], at)
        if at >= 10:
            ours.append(abs(tracker.project(end).tokens_per_s[A] - 500))
            naive.append(abs(rate - 500))
    assert np.mean(ours) < 0.9 * np.mean(naive)


def test_ended_demand_decays_to_nothing_and_is_never_negative() -> None:
    tracker = _tracker(A)
    end = _feed(tracker, A, [1000.0] * 10)
    projected = [tracker.project(end + WINDOW_S * windows).tokens_per_s[A] for windows in range(1, 40)]
    assert min(projected) >= 0
    assert projected[-1] < 1e-3
    assert tracker.project(end + 1e9).tokens_per_s[A] == 0


def test_a_flash_crowd_shows_before_its_window_closes() -> None:
    tracker = _tracker(A)
    end = _feed(tracker, A, [100.0] * 10)
    assert not tracker.observe(A, 500, end)
    assert tracker.observe(A, 60_000, end + 1.0), "it surges"
    assert tracker.project(end + 1.0).tokens_per_s[A] >= 6_000


def test_an_unseen_adapter_gets_the_mean_of_its_rank_then_of_all_then_the_given_prior() -> None:
    newcomer = adapter("newcomer", 8)
    stranger = adapter("stranger", 64)
    tracker = _tracker(adapter("lone"))
    assert tracker.project(0.0).tokens_per_s[adapter("lone")] == DemandOptions().prior_tokens_per_s
    eights, large = [adapter("x", 8), adapter("y", 8)], adapter("z", 128)
    tracker = _tracker(*eights, large)
    for window in range(8):
        for ref, tokens in zip([*eights, large], [1000, 3000, 9000], strict=True):
            tracker.observe(ref, tokens, window * WINDOW_S)
    tracker.advance(80.0)
    tracker.add(newcomer)
    tracker.add(stranger)
    projected = tracker.project(80.0).tokens_per_s
    assert projected[newcomer] == pytest.approx(200.0, rel=0.02)
    assert projected[stranger] == pytest.approx(1300 / 3, rel=0.02)


def test_the_prior_fades_as_an_adapter_stays_unasked() -> None:
    tracker = _tracker(A, B)
    _feed(tracker, A, [400.0] * 5)
    rates = []
    for at in range(5, 15):
        end = _feed(tracker, A, [400.0], at)
        rates.append(tracker.project(end).tokens_per_s[B])
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 1.0


def test_a_removed_adapter_leaves_no_history_to_the_next() -> None:
    tracker = _tracker(A)
    end = _feed(tracker, A, [1000.0] * 5)
    tracker.remove(A)
    tracker.add(B)
    assert list(tracker.project(end).tokens_per_s) == [B]
    assert tracker.project(end).tokens_per_s[B] == DemandOptions().prior_tokens_per_s


def test_many_adapters_keep_their_own_rates() -> None:
    refs = [adapter(f"a{at}", 8) for at in range(300)]
    tracker = _tracker(*refs)
    for window in range(12):
        for at, ref in enumerate(refs):
            tracker.observe(ref, at * 10, window * WINDOW_S)
    projected = tracker.project(120.0).tokens_per_s
    for at, ref in enumerate(refs):
        assert projected[ref] == pytest.approx(at, abs=0.03 * at + 3)
