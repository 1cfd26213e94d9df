"""Learning what steps cost: found within so many steps whatever the profile said, and not led astray by chance."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.cluster.cost.learnt import LearntCost
from scheduler.cluster.cost.model import AdapterLoad, CostModel, Kernel, StepLoad, features
from scheduler.cluster.cost.pace import Pace
from scheduler.cluster.cost.pace_fit import PaceFits
from scheduler.cluster.cost.step_tally import Floats, StepParts

PROFILES = {
    "roofline": CostModel(Kernel.EXACT, 20e-3, 9e-5, 5e-6, 15e-8, 6e-6, 3e-8),
    "measured": CostModel(Kernel.EXACT, 21e-3, 0.0, 4e-4, 4e-6, 6e-5, 4e-6, 1e-3, 1.5e-4, 5e-7, 8e-4, 6.0),
}
RIDGE = 0.2
RANKS = (8, 16, 32, 64, 128)


def _under(model: CostModel, kernel: Kernel) -> CostModel:
    return model.under(kernel, 128)


def _models(model: CostModel, told: Kernel) -> list[CostModel]:
    """The profile's models, that of the kernel that the node is said to have first."""
    return [_under(model, kernel) for kernel in (told, *(each for each in Kernel if each is not told))]


def _steps(
    rng: np.random.Generator, count: int, ranks: Sequence[int] = RANKS, most: int = 40
) -> Iterator[StepLoad]:
    """A node's steps: batches that grow and shrink, popular and rare adapters, now and then a prompt."""
    of = rng.choice(ranks, 30).tolist()
    size = int(rng.integers(2, most))
    for _ in range(count):
        size = min(most, max(1, size + int(rng.integers(-2, 3))))
        drawn = np.minimum((rng.pareto(0.8, size) * 2).astype(int), 29).tolist()
        prompts = {int(rng.integers(30)): int(rng.choice([100, 500]))} if rng.random() < 0.3 else {}
        decoding = {each: drawn.count(each) for each in drawn}
        parts = (
            AdapterLoad(of[each], prompts.get(each, 0), decoding.get(each, 0))
            for each in dict.fromkeys((*prompts, *decoding))
        )
        pairs = sum(rows * rows // 2 for rows in prompts.values())
        yield StepLoad(tuple(parts), size * int(rng.integers(600, 1400)), pairs)


def _learn(
    learnt: LearntCost,
    truth: CostModel,
    steps: Iterator[StepLoad],
    rng: np.random.Generator,
    noise: float = 0,
) -> None:
    for load in steps:
        learnt.observe(load, truth.step_s(load) * float(rng.lognormal(0, noise)))


def _error(learnt: LearntCost, profile: CostModel, truth: CostModel, rng: np.random.Generator) -> float:
    """Mean relative error of what is believed, on steps like those learnt from."""
    believed = learnt.pace.of(_under(profile, learnt.kernel))
    loads = list(_steps(rng, 200))
    return float(np.mean([abs(believed.step_s(load) / truth.step_s(load) - 1) for load in loads]))


@pytest.mark.parametrize("kernel", list(Kernel))
def test_the_parts_of_a_step_are_those_of_its_features(kernel: Kernel) -> None:
    model = _under(PROFILES["measured"], kernel)
    loads = [*_steps(np.random.default_rng(1), 50, (0, 8, 128)), StepLoad((AdapterLoad(0, 0, 1),), 5)]
    every = StepParts([PROFILES["roofline"], model])
    parts = every.of([every.tally(load) for load in loads])[1]
    for load, found in zip(loads, parts, strict=True):
        charged = np.array(features(load, kernel, model.knee_rows, model.fixed_rank)) * np.array(
            model.coefficients
        )
        fixed, lora = charged[[0, 2, 3]].sum(), charged[4:8].sum()
        assert found == pytest.approx([fixed, charged.sum() - fixed - lora, lora], abs=1e-15)


@pytest.mark.parametrize("told", list(Kernel))
@pytest.mark.parametrize("true", list(Kernel))
@pytest.mark.parametrize("name", list(PROFILES))
def test_the_true_kernel_is_found_whatever_was_told(name: str, true: Kernel, told: Kernel) -> None:
    """Batches are small, since the largest rank is in every large one: PADDED and FIXED then cost the same."""
    profile = PROFILES[name]
    for seed in range(3):
        rng = np.random.default_rng(seed)
        learnt, truth = LearntCost(_models(profile, told)), _under(profile, true)
        _learn(learnt, truth, _steps(rng, 200, most=8), rng)
        assert learnt.kernel is true
        assert _error(learnt, profile, truth, rng) < 0.01


@pytest.mark.parametrize("true", list(Kernel))
@pytest.mark.parametrize("name", list(PROFILES))
def test_every_coefficient_that_is_wrong_costs_little_soon(name: str, true: Kernel) -> None:
    """Each is off by up to 30 %, the kernel told is wrong, and chance makes steps longer and shorter."""
    profile = PROFILES[name]
    for seed in range(3):
        rng = np.random.default_rng(seed)
        wrong = np.array(profile.coefficients) * rng.uniform(0.7, 1.3, 10)
        truth = _under(CostModel(Kernel.EXACT, *wrong.tolist(), knee_rows=profile.knee_rows), true)
        told = Kernel.PADDED if true is Kernel.EXACT else Kernel.EXACT
        learnt = LearntCost(_models(profile, told))
        _learn(learnt, truth, _steps(rng, 600), rng, noise=0.1)
        assert _error(learnt, profile, truth, np.random.default_rng(9)) < 0.06


def test_noise_and_rare_outliers_change_neither_kernel_nor_pace() -> None:
    profile = PROFILES["roofline"]
    for seed in range(5):
        rng = np.random.default_rng(seed)
        learnt = LearntCost(_models(profile, Kernel.EXACT))
        for load in _steps(rng, 1200):
            held_up = 20 if rng.random() < 0.01 else 1
            learnt.observe(load, profile.step_s(load) * float(rng.lognormal(0, 0.1)) * held_up)
            assert learnt.kernel is Kernel.EXACT
        assert _error(learnt, profile, profile, rng) < 0.08
        assert learnt.slowdown == pytest.approx(1, abs=0.08)


@pytest.mark.parametrize("factor", [3.0, 4.0, 0.4])
def test_a_node_that_changes_its_pace_at_once_is_followed_within_32_steps_there_and_back(
    factor: float,
) -> None:
    profile, rng = PROFILES["roofline"], np.random.default_rng(2)
    learnt = LearntCost(_models(profile, Kernel.EXACT))
    for times in (1.0, factor, 1.0):
        truth = Pace(times, times, times).of(profile)
        _learn(learnt, truth, _steps(rng, 32), rng, noise=0.05)
        assert _error(learnt, profile, truth, np.random.default_rng(9)) < 0.12
        _learn(learnt, truth, _steps(rng, 400), rng, noise=0.05)
        assert learnt.slowdown == pytest.approx(times, rel=0.06)
        assert learnt.kernel is Kernel.EXACT


def test_a_node_without_work_is_believed_slow_for_a_while_only_and_again_when_it_shows() -> None:
    profile, rng = PROFILES["roofline"], np.random.default_rng(8)
    learnt, slow = LearntCost(_models(profile, Kernel.EXACT)), Pace(4.0, 4.0, 4.0).of(profile)
    _learn(learnt, slow, _steps(rng, 64), rng)
    for _ in range(20):
        learnt.rest()
    assert 1 < learnt.slowdown < 1.3
    _learn(learnt, slow, _steps(rng, 8), rng)
    assert learnt.slowdown == pytest.approx(4, rel=0.05)


def test_a_pace_that_drifts_is_followed() -> None:
    profile, rng = PROFILES["roofline"], np.random.default_rng(3)
    learnt, errors = LearntCost(_models(profile, Kernel.EXACT)), []
    for at in range(30):
        times = 1 + at / 15
        truth = Pace(times, times, times).of(profile)
        _learn(learnt, truth, _steps(rng, 40), rng, noise=0.05)
        errors.append(_error(learnt, profile, truth, np.random.default_rng(9)))
    assert max(errors) < 0.1


def test_what_steps_do_not_tell_apart_stays_as_profiled() -> None:
    """All adapters are of one rank, each on its own, all decode: no kind of kernel and no part shows."""
    profile, rng = PROFILES["roofline"], np.random.default_rng(4)
    learnt = LearntCost(_models(profile, Kernel.PADDED))
    alike = StepLoad((AdapterLoad(16, 0, 1),) * 8, 8000)
    _learn(learnt, profile, iter([alike] * 1000), rng, noise=0.1)
    assert learnt.kernel is Kernel.PADDED
    pace = learnt.pace
    assert [pace.fixed, pace.prompt, pace.lora] == pytest.approx([1, 1, 1], abs=0.15)


def test_the_part_that_is_slow_is_found() -> None:
    profile, rng = PROFILES["measured"], np.random.default_rng(5)
    learnt, truth = LearntCost(_models(profile, Kernel.EXACT)), Pace(1.0, 0.7, 2.0).of(profile)
    _learn(learnt, truth, _steps(rng, 600), rng)
    pace = learnt.pace
    assert [pace.fixed, pace.prompt, pace.lora] == pytest.approx([1.0, 0.7, 2.0], rel=0.05)


def test_the_slowdown_is_seconds_over_those_told_also_where_the_kernel_told_is_wrong() -> None:
    profile, rng = PROFILES["roofline"], np.random.default_rng(6)
    truth, told = _under(profile, Kernel.PADDED), profile
    learnt, loads = LearntCost(_models(profile, Kernel.EXACT)), list(_steps(rng, 400))
    _learn(learnt, truth, iter(loads), rng)
    late = loads[-200:]
    over = sum(map(truth.step_s, late)) / sum(map(told.step_s, late))
    assert learnt.slowdown == pytest.approx(over, rel=0.05)
    assert over > 1.05


def test_learning_is_the_same_every_time_and_takes_no_more_memory_as_steps_go_by() -> None:
    profile, learnt = PROFILES["roofline"], [LearntCost(_models(PROFILES["roofline"], Kernel.EXACT))] * 2
    learnt[1] = LearntCost(_models(profile, Kernel.EXACT))
    for each in learnt:
        rng = np.random.default_rng(7)
        _learn(each, profile, _steps(rng, 300), rng, noise=0.1)
    assert (learnt[0].pace, learnt[0].kernel, learnt[0].slowdown) == (
        learnt[1].pace,
        learnt[1].kernel,
        learnt[1].slowdown,
    )


_PARTS = st.builds(AdapterLoad, st.integers(0, 256), st.integers(0, 8192), st.integers(0, 512))
_LOADS = st.builds(
    StepLoad, st.lists(_PARTS, max_size=6).map(tuple), st.integers(0, 10**7), st.integers(0, 10**8)
)
_SECONDS = st.one_of(st.floats(), st.floats(1e-9, 1e9))


@given(st.lists(st.tuples(_LOADS, _SECONDS), max_size=80), st.sampled_from(list(Kernel)))
@settings(deadline=None, max_examples=30)
def test_whatever_is_observed_the_pace_stays_a_number_above_0(
    steps: list[tuple[StepLoad, float]], told: Kernel
) -> None:
    learnt = LearntCost(_models(PROFILES["measured"], told))
    for load, seconds in steps:
        learnt.observe(load, seconds)
    pace = learnt.pace
    assert all(0.009 < factor < 101 for factor in (pace.fixed, pace.prompt, pace.lora))
    assert 0 < learnt.slowdown < np.inf


def test_a_profile_that_says_a_step_is_free_is_not_learnt_from() -> None:
    free = CostModel(Kernel.EXACT, 0.0, 0.0, 0.0, 0.0, 1e-6, 0.0)
    learnt = LearntCost([free])
    for load in [StepLoad((AdapterLoad(0, 0, 1),), 10), StepLoad((AdapterLoad(8, 0, 1),), 10)] * 80:
        learnt.observe(load, 16e-6)
    assert learnt.pace.lora == pytest.approx(2.0, rel=0.05)


@given(st.integers(0, 2**31), st.integers(1, 40))
@settings(deadline=None)
def test_a_fit_is_that_of_brute_force(seed: int, batches: int) -> None:
    """Steady noise, so that nothing is clipped or forgotten at once: weighted least squares with a ridge."""
    rng = np.random.default_rng(seed)
    parts: Floats = rng.uniform(0.1, 1.0, (1, 8 * batches, 3))
    seconds = (parts[0] @ rng.uniform(0.9, 1.1, 3)) * rng.uniform(0.95, 1.05, 8 * batches)
    fits = PaceFits(1)
    for at in range(0, 8 * batches, 8):
        fits.learn(parts[:, at : at + 8], seconds[at : at + 8])
    ages = 8 * (np.arange(8 * batches)[::-1] // 8)
    told = parts[0].sum(1)
    x, y = parts[0] / told[:, None], seconds / told
    late = np.exp(-ages / 48)
    prior = 4 * np.exp(-8 * batches / 48)
    late_x, late_y = (x * late[:, None]).sum(0) + prior / 3, float((y * late).sum()) + prior
    weight = np.sqrt(np.exp(-ages / 400))
    rows = np.vstack([x * weight[:, None], np.sqrt(RIDGE) * np.eye(3)])
    theta = np.linalg.lstsq(rows, np.append(y * weight, [np.sqrt(RIDGE) * late_y / late_x.sum()] * 3))[0]
    expected = theta * late_y / (theta @ late_x)
    found = fits.pace(0)
    assert [found.fixed, found.prompt, found.lora] == pytest.approx(expected, rel=1e-6)
