"""One server that promises latencies: what it predicts to be late is refused at once, and what became late too."""

import asyncio
import math
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest

from engine.api.errors import as_api_error
from engine.async_engine import AsyncEngine
from engine.cluster.roles.single_role import keep_in_time
from engine.config.command_line import serve_config
from engine.errors import NotAdmitted
from engine.live.in_time import InTimeAdmission
from engine.live.node_load import NodeJobs, NodeRoom
from engine.metrics.telemetry import Telemetry
from engine.output import RequestOutput
from engine.runner.step_costs import StepCosts
from scheduler.cluster.cost.forecast import ROOMY, Forecast
from scheduler.cluster.cost.model import CostModel, Kernel
from scheduler.cluster.cost.profile import Lengths, Slo
from scheduler.cluster.routing.cost_estimator import CostEstimator
from scheduler.cluster.routing.slo_admission import RetryTimes, SloAdmission
from scheduler.request import SamplingParams
from tests.engine.rig import BLOCK_SIZE, Rig, build, is_clean

PARAMS = SamplingParams(max_tokens=4)
PROMPT = tuple(range(7, 47))  # of 40 tokens, which take 0.4 s by `MODEL`
MODEL = CostModel(Kernel.EXACT, 1e-3, 1e-2, 1e-5, 1e-9, 1e-7, 1e-9)


def _serve(folder: Path, slo: Slo, visit: Callable[[AsyncEngine, Rig], Awaitable[None]]) -> None:
    """Run `visit` beside an engine that keeps `slo`; afterwards nothing of any request may be left."""

    async def session() -> None:
        rig = build(folder)
        engine = AsyncEngine(rig.engine, Telemetry(), 64)
        costs = StepCosts((MODEL,), None, 32)
        jobs = NodeJobs(rig.engine.core, costs, NodeRoom(8, 64, BLOCK_SIZE), lambda: math.inf, 0)
        estimator = CostEstimator(Forecast(MODEL, Lengths(40.0, 4.0), ROOMY))
        retry = RetryTimes(np.random.default_rng(0))
        engine.keep_in_time(InTimeAdmission(SloAdmission(estimator, slo), jobs, retry))
        await engine.start()
        try:
            await asyncio.wait_for(visit(engine, rig), 60)
        finally:
            rig.executor.gate.set()
            await engine.close()
            assert is_clean(rig.engine)
            assert not len(jobs)

    asyncio.run(session())


async def _answer(output: RequestOutput) -> int:
    return sum([len(delta.token_ids) async for delta in output])


def test_what_would_be_late_behind_others_is_refused_until_they_have_run(tmp_path: Path) -> None:
    async def visit(engine: AsyncEngine, rig: Rig) -> None:
        rig.executor.gate.clear()
        running = [await engine.submit("low", PROMPT, PARAMS, name) for name in ("a", "b")]
        with pytest.raises(NotAdmitted) as refused:
            await engine.submit("low", PROMPT, PARAMS, "c")
        answer = as_api_error(refused.value)
        assert (answer.status, answer.code) == (429, "overloaded")
        assert int(answer.headers["Retry-After"]) >= 1
        rig.executor.gate.set()
        assert await asyncio.gather(*map(_answer, running)) == [4, 4]
        assert await _answer(await engine.submit("low", PROMPT, PARAMS, "d")) == 4

    _serve(tmp_path, Slo(1.0, math.inf), visit)


def test_of_several_prompts_that_come_together_all_are_taken_or_none(tmp_path: Path) -> None:
    async def visit(engine: AsyncEngine, rig: Rig) -> None:
        with pytest.raises(NotAdmitted):
            await engine.submit_all("low", dict.fromkeys("abc", PROMPT), PARAMS)
        taken = await engine.submit_all("low", dict.fromkeys("ab", PROMPT), PARAMS)
        assert await asyncio.gather(*map(_answer, taken)) == [4, 4]

    _serve(tmp_path, Slo(1.0, math.inf), visit)


def test_a_step_that_would_become_too_long_for_all_is_refused(tmp_path: Path) -> None:
    async def visit(engine: AsyncEngine, rig: Rig) -> None:
        with pytest.raises(NotAdmitted):
            await engine.submit("low", PROMPT, PARAMS, "a")

    _serve(tmp_path, Slo(math.inf, 1e-4), visit)


def test_one_that_became_late_while_it_waited_is_told_when_to_come_again(tmp_path: Path) -> None:
    async def visit(engine: AsyncEngine, rig: Rig) -> None:
        rig.executor.gate.clear()
        first = await engine.submit("base", PROMPT[:2], PARAMS, "a")
        await asyncio.to_thread(rig.executor.entered.wait)
        late = await engine.submit("base", PROMPT[:2], PARAMS, "b")
        by_s = late.request.first_token_by_s
        assert by_s is not None
        while asyncio.get_running_loop().time() <= by_s:
            await asyncio.sleep(0.05)
        rig.executor.gate.set()
        with pytest.raises(NotAdmitted):
            await _answer(late)
        assert await _answer(first) == 4

    _serve(tmp_path, Slo(0.5, math.inf), visit)


def test_a_client_that_leaves_no_longer_counts(tmp_path: Path) -> None:
    async def visit(engine: AsyncEngine, rig: Rig) -> None:
        rig.executor.gate.clear()
        for name in ("a", "b", "c", "d"):
            await (await engine.submit("low", PROMPT, PARAMS, name)).aclose()
        rig.executor.gate.set()

    _serve(tmp_path, Slo(1.0, math.inf), visit)


def test_the_options_of_one_server_bound_its_steps_and_refuse_what_is_late(tmp_path: Path) -> None:
    async def visit(ttft_s: str) -> int:
        config = serve_config(["--device", "cpu", "--slo-ttft-s", ttft_s, "--slo-tbt-s", "5"], {})
        rig = build(tmp_path / ttft_s)
        engine = AsyncEngine(rig.engine, Telemetry(), 64)
        keep_in_time(config, rig.engine, engine)
        costs = rig.engine.core.costs
        assert costs is not None
        assert costs.step_rows is not None
        await engine.start()
        try:
            return await _answer(await engine.submit("low", PROMPT, PARAMS, "a"))
        finally:
            await engine.close()

    for folder in ("60", "0.000001"):
        (tmp_path / folder).mkdir()
    assert asyncio.run(visit("60")) == 4
    with pytest.raises(NotAdmitted):
        asyncio.run(visit("0.000001"))
