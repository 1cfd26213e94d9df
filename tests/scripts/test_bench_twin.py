"""The twins' arithmetic, the simulated one against a sum by hand, the live one on the embedded engine."""

import asyncio
import json
from pathlib import Path

import pytest

from engine.assembly.assembly import assemble
from engine.config.config import EngineConfig
from lora.adapter import BASE, AdapterRef
from scheduler.cluster.cost.model import CostModel, Kernel
from scheduler.limits import StepLimits
from scheduler.sim.workload.trace import Call
from scripts.bench.twin import __main__ as twin
from scripts.bench.twin import load
from scripts.bench.twin.answers import TwinAnswer, TwinRequest, answer_live, answer_simulated
from scripts.bench.twin.draw import draw, read_run
from scripts.profile_node.live_engine import NodeCapacity

MODEL = CostModel(Kernel.EXACT, 0.010, 0.001, 0.002, 0.0, 0.0001, 0.0)
CAPACITY = NodeCapacity(StepLimits(8, 64, 512), kv_blocks=64, block_tokens=16)
ADAPTERS = tuple(AdapterRef(f"{at}", f"a{at}", 8 << at, ("q_proj",), 1) for at in range(5))


def test_a_lone_request_takes_the_steps_that_the_model_says() -> None:
    ask = TwinRequest(1.0, ADAPTERS[0], tuple(range(100)), 3)
    (told,), computing = answer_simulated(MODEL, CAPACITY, [ask])
    lora_s, decode_s = 8 * 0.0001, 0.010 + 0.002 + 8 * 0.0001
    first_s = (0.010 + 64 * 0.001 + lora_s) + (0.010 + 36 * 0.001 + lora_s)
    assert told.ttft_s == pytest.approx(first_s)
    assert told.gaps_s == pytest.approx((decode_s, decode_s))
    assert computing == pytest.approx((first_s + 2 * decode_s) / (1 + first_s + 2 * decode_s))


def test_a_request_joins_the_step_after_the_one_that_runs_when_it_comes() -> None:
    asks = [TwinRequest(0.0, BASE, (1, 2, 3), 4), TwinRequest(0.0, ADAPTERS[4], (4, 5), 4)]
    told, _ = answer_simulated(MODEL, CAPACITY, asks)
    assert told[0].token_times_s[1:] == told[1].token_times_s[:-1]


def test_the_live_twin_answers_every_request_in_full_and_no_sooner_than_asked() -> None:
    engine = assemble(EngineConfig(max_model_len=128, kv_cache_bytes=8 << 20, progress=False))
    reverse = engine.store.registry.resolve(engine.store.registry.entries()[0].name)
    asks = [
        TwinRequest(0.05 * at, (BASE, reverse)[at % 2], tuple(range(1, 9 + at)), 5 + at) for at in range(4)
    ]
    ends: list[None] = []
    told = asyncio.run(answer_live(engine, asks, lambda: ends.append(None)))
    assert [each.request for each in told] == asks
    assert [len(each.token_times_s) for each in told] == [5, 6, 7, 8]
    assert all(each.ttft_s > 0 and min(each.gaps_s) >= 0 for each in told)
    assert len(ends) == 4


def test_figures_by_hand() -> None:
    ask = TwinRequest(1.0, BASE, (1,) * 6, 2)
    told = [TwinAnswer(ask, (1.5, 1.7)), TwinAnswer(ask, (2.5, 3.0))]
    assert twin.figures([told]) == pytest.approx(
        {
            "ttft_mean_s": 1.0,
            "ttft_p95_s": 1.45,
            "tbt_mean_s": 0.35,
            "tbt_p95_s": 0.485,
            "tokens_per_s": 16 / 3,
        }
    )


def test_the_rate_is_where_the_wanted_part_of_the_time_is_spent() -> None:
    assert load.rate_for(lambda rate: rate / 10, 0.6) == pytest.approx(6, abs=0.2)


def test_calls_are_scaled_and_fit_the_engine() -> None:
    trace = tuple(Call(float(at), 80 * at, 40) for at in range(200))
    source = load.CallSource(trace, first=0, seconds=20.0, length_factor=0.125, lengths=(1, 1), seed=0)
    calls = source.calls(rate=5.0)
    assert len(calls) == 100
    assert calls[-1].arrival_s < 20
    assert [call.prompt_tokens for call in calls[:4]] == [1, 10, 20, 30]
    assert max(call.prompt_tokens for call in calls) == 512
    assert {call.output_tokens for call in calls} == {5}


def test_without_a_trace_calls_are_poisson() -> None:
    source = load.CallSource((), first=0, seconds=100.0, length_factor=1.0, lengths=(50, 10), seed=0)
    assert 120 < len(source.calls(rate=1.5)) < 180


def test_what_is_asked_depends_on_the_seed() -> None:
    calls = [Call(float(at), 5, 2) for at in range(30)]
    one, same, other = (
        load.draw_requests(calls, load.RequestMix(ADAPTERS, 0.5, 1000, seed)) for seed in (1, 1, 2)
    )
    assert one == same
    assert one != other
    assert len({ask.prompt_token_ids for ask in one}) == 30


def test_the_figure_draws_the_last_run_and_says_how_far_off_it_is(tmp_path: Path) -> None:
    def rows(scale: float) -> list[object]:
        ask = TwinRequest(0.0, BASE, (1,), 4)
        both = (
            ("live", TwinAnswer(ask, (1.0, 2.0, 3.0, 4.0))),
            ("sim", TwinAnswer(ask, tuple(scale * at for at in (1, 2, 3, 4)))),
        )
        about = {"what": "run", "requests": 1, "rate": 1.0, "computing": 0.5, "hardware": "h"}
        return [about, *(twin.request_row(name, 0, told) for name, told in both)]

    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in (*rows(3.0), *rows(1.1))))
    drawn = draw(*read_run(path))
    assert [axes.get_title() for axes in drawn.axes] == ["mean +10.0%, P95 +10.0%"] * 2
    drawn.savefig(tmp_path / "figure.png")
