"""A step's rows follow from what steps took, and bring steps to the seconds that they may last."""

import numpy as np
import pytest

from scheduler.step_budget import StepBudget

EMPTY_S, ROW_S = 0.03, 80e-6


def _seconds(rows: int) -> float:
    return EMPTY_S + rows * ROW_S


@pytest.mark.parametrize("step_s", [0.05, 0.1, 0.15])
def test_steps_come_to_last_what_they_may(step_s: float) -> None:
    budget, rng = StepBudget(step_s, 2048), np.random.default_rng(0)
    for _ in range(100):
        rows = int(rng.integers(0, budget.rows + 1))
        budget.ran(rows, _seconds(rows) * float(rng.lognormal(0, 0.05)))
    assert _seconds(budget.rows) == pytest.approx(step_s, rel=0.15)


def test_the_budget_follows_a_node_that_becomes_slower() -> None:
    budget, rng = StepBudget(0.1, 2048), np.random.default_rng(1)
    for pace in (1.0, 2.0):
        for _ in range(300):
            rows = int(rng.integers(0, budget.rows + 1))
            budget.ran(rows, pace * _seconds(rows))
        assert pace * _seconds(budget.rows) == pytest.approx(0.1, rel=0.1)


def test_it_keeps_within_its_bounds_and_needs_steps_that_differ() -> None:
    budget = StepBudget(0.01, 2048, least_rows=64)
    for _ in range(50):
        budget.ran(500, 0.07)
    assert budget.rows == 2048, "steps all alike tell nothing of a row"
    for rows in (0, 500) * 50:
        budget.ran(rows, _seconds(rows))
    assert budget.rows == 64, "even an empty step is too long"
    fast = StepBudget(10.0, 2048)
    for rows in (0, 500) * 50:
        fast.ran(rows, _seconds(rows))
    assert fast.rows == 2048


def test_senseless_bounds_are_refused() -> None:
    with pytest.raises(ValueError, match="step_s=0"):
        StepBudget(0, 10)
