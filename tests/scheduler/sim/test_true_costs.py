"""What steps truly take: as the profile says, or off by what the seed draws."""

import numpy as np
import pytest

from scheduler.cluster.cost.model import AdapterLoad, CostModel, Kernel, StepLoad
from scheduler.sim.true_costs import AS_PROFILED, Deviation, TrueCosts

MODEL = CostModel(Kernel.EXACT, 9e-3, 2e-4, 1e-4, 2e-6, 2e-6, 3e-7, 4e-4, 6e-5, 7e-7, 3e-4, 24.0)
LOAD = StepLoad((AdapterLoad(8, 100, 4), AdapterLoad(64, 0, 2)), 3000, 5050)


def _paces(deviation: Deviation, seconds: int, node: str = "n0") -> list[float]:
    """List a step's seconds over those of the profile, second by second."""
    costs = TrueCosts(deviation, MODEL, node)
    return [costs.step_s(LOAD, float(at)) / MODEL.step_s(LOAD) for at in range(seconds)]


def test_without_deviation_steps_take_what_the_profile_says() -> None:
    costs = TrueCosts(AS_PROFILED, MODEL, "n0")
    assert costs.model == MODEL
    assert [costs.step_s(LOAD, at) for at in (0.0, 99.5)] == [MODEL.step_s(LOAD)] * 2


def test_each_part_of_each_node_is_off_by_a_factor_of_its_own() -> None:
    deviation = Deviation(seed=1, sigma=0.1)
    models = [TrueCosts(deviation, MODEL, f"n{at}").model for at in range(200)]
    factors = np.log([np.divide(model.coefficients, MODEL.coefficients) for model in models])
    assert factors.std(0) == pytest.approx([0.1] * 10, rel=0.25)
    assert factors.mean(0) == pytest.approx([0.0] * 10, abs=0.03)
    assert len(np.unique(factors)) == factors.size
    assert {model.knee_rows for model in models} == {24.0}


def test_a_node_that_starts_anew_is_the_same_machine_and_another_seed_another() -> None:
    def drawn(seed: int, node: str) -> list[float]:
        return _paces(Deviation(seed, sigma=0.1, drift=0.2), 50, node)

    assert drawn(1, "n0") == drawn(1, "n0")
    assert len({tuple(drawn(seed, node)) for seed in (1, 2) for node in ("n0", "n1")}) == 4


def test_the_pace_drifts_slowly_and_within_its_bound() -> None:
    paces = np.log(_paces(Deviation(seed=3, drift=0.2), 5000))
    assert np.abs(paces).max() <= 0.2 + 1e-9
    assert np.abs(np.diff(paces)).max() < 0.1
    assert (paces.min() < -0.15, paces.max() > 0.15) == (True, True)
    assert abs(paces.mean()) < 0.05


def test_the_drift_does_not_depend_on_how_often_it_is_asked_for() -> None:
    often, seldom = (TrueCosts(Deviation(seed=4, drift=0.2), MODEL, "n0") for _ in range(2))
    for at in range(400):
        often.step_s(LOAD, at / 4)
    assert often.step_s(LOAD, 100.0) == seldom.step_s(LOAD, 100.0)


def test_a_node_may_run_other_kernels_than_it_was_profiled_with() -> None:
    padded = MODEL.under(Kernel.PADDED)
    costs = TrueCosts(Deviation(model=padded), MODEL, "n0")
    assert costs.step_s(LOAD, 0.0) == padded.step_s(LOAD) > MODEL.step_s(LOAD)


@pytest.mark.parametrize("given", [{"sigma": -0.1}, {"drift": -1.0}])
def test_a_deviation_below_none_is_refused(given: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="give 0 or more"):
        Deviation(**given)
