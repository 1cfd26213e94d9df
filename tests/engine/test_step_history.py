"""What is remembered of steps: the last ones, who ran in them and under what, however long the engine runs."""

from pathlib import Path

from engine.runner.step_history import MOST_STEPS, StepHistory
from lora.adapter import BASE
from scheduler.plan import StepPlan
from scheduler.request import Request, SamplingParams
from tests.engine.rig import build


def run(folder: Path, *, lags: bool = False) -> StepHistory:
    """Run a request for the base and one for an adapter to their ends."""
    engine = build(folder, lags=lags).engine
    high = engine.store.registry.resolve("high")
    for name, adapter in (("plain", BASE), ("tuned", high)):
        params = SamplingParams(max_tokens=4, temperature=0)
        engine.core.submit(Request(name, tuple(range(3, 13)), adapter, params, (2,), 0.0))
    for _ in range(2000):
        if not engine.core.num_live_requests:
            break
        if engine.core.step().idle:
            engine.changed.wait(0.01)
    assert not engine.core.num_live_requests
    history, steps = engine.core.history, engine.core.steps
    engine.close()
    assert history.count == steps
    return history


def test_each_step_tells_who_ran_under_what(tmp_path: Path) -> None:
    records = run(tmp_path).last()
    assert [each.number for each in records] == list(range(len(records), 0, -1))
    told = {(part.request_id, part.adapter, part.rank) for each in records for part in each.slices}
    assert told == {("plain", None, 0), ("tuned", "high", 24)}
    for name in ("plain", "tuned"):
        parts = [part for each in reversed(records) for part in each.slices if part.request_id == name]
        assert (parts[0].start, sum(part.draws for part in parts)) == (0, 4)
        assert [part.start for part in parts[1:]] == [part.start + part.tokens for part in parts[:-1]]
    assert all(each.tokens == sum(part.tokens for part in each.slices) for each in records)
    assert all(each.seconds >= 0 and each.adapters in (0, 1) for each in records)


def test_a_step_that_lags_is_told_once(tmp_path: Path) -> None:
    records = run(tmp_path, lags=True).last()
    assert [each.number for each in records] == list(range(len(records), 0, -1))


def test_only_the_last_steps_are_kept() -> None:
    history = StepHistory()
    for _ in range(3 * MOST_STEPS):
        history.ran(StepPlan(()), 0.01)
    assert [each.number for each in history.last()] == list(range(3 * MOST_STEPS, 2 * MOST_STEPS, -1))
