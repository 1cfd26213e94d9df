"""Operating points between, below and above the profiled ranks; shares that sum to 1."""

import pytest

from scheduler.cluster.state import NodeState, OperatingPoints, Share, normalised

POINTS = OperatingPoints((8, 16, 64), (1000.0, 500.0, 250.0))


@pytest.mark.parametrize(
    ("rank", "tokens_per_s"),
    [(4, 1000.0), (8, 1000.0), (16, 500.0), (64, 250.0), (12, 1 / 0.0015), (40, 1 / 0.003), (112, 1 / 0.006)],
)
def test_seconds_per_token_are_linear_in_rank(rank: int, tokens_per_s: float) -> None:
    assert POINTS.at(rank) == pytest.approx(tokens_per_s)


def test_a_slow_node_sustains_less() -> None:
    assert NodeState("n", 1, POINTS, slowdown=2.0).sustains(8) == 500.0


@pytest.mark.parametrize(
    ("ranks", "rates"),
    [((), ()), ((8,), (1.0, 2.0)), ((16, 8), (2.0, 1.0)), ((8, 16), (1.0, 2.0)), ((8,), (0.0,))],
)
def test_operating_points_that_make_no_sense_are_refused(
    ranks: tuple[int, ...], rates: tuple[float, ...]
) -> None:
    with pytest.raises(ValueError, match=r"ranks|tokens_per_s"):
        OperatingPoints(ranks, rates)


def test_shares_are_merged_scaled_and_freed_of_zeros() -> None:
    assert normalised([("a", 1.0), ("b", 0.0), ("a", 1.0), ("c", 2.0)]) == (Share("a", 0.5), Share("c", 0.5))
    assert normalised([("a", 0.0)]) == ()
