"""The load run notices what it is there to notice, against a stand-in for the server."""

import asyncio
import json
from pathlib import Path

import pytest

from scripts.bench.serving import __main__ as bench_serving
from scripts.bench.serving.client import LoadGenerator, RequestEnd, RequestOutcome
from scripts.bench.serving.http_request import HttpRequest
from scripts.bench.serving.server import ServerFailed, leftovers, parse_metrics, parse_models, read_rank
from scripts.bench.serving.traffic import PlannedRequest
from tests.scripts.stub_server import ADAPTERS, BASE, StubServer


def run_load(stub: StubServer, *arguments: str, rest_s: float = 5.0) -> bool:
    async def run() -> bool:
        async with stub.serve() as url:
            return await bench_serving.run_load(bench_serving.parse(["--url", url, *arguments]), rest_s)

    return asyncio.run(run())


def test_a_sound_server_passes_and_every_request_is_accounted_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub, out = StubServer(), tmp_path / "rows.jsonl"
    assert run_load(stub, "--requests", "200", "--fault-share", "0.3", "--clients", "16", "--out", str(out))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    total = rows[-1]
    assert {row["model"] for row in rows} == {BASE, *ADAPTERS, "(all)"}
    assert total["requests"] == 200 == sum(row["requests"] for row in rows[:-1])
    assert total["left"] > 0
    assert total["refused"] > 0
    assert total["failed"] == total["wrong"] == total["turned away"] == 0
    assert total["ok"] + total["left"] + total["refused"] == 200
    assert total["ttft_p50_ms"] <= total["ttft_p95_ms"]
    assert "leaked: nothing" in capsys.readouterr().out


def test_a_sequence_left_behind_by_a_killed_client_fails_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--requests", "60", "--fault-share", "1", "--output-tokens", "200"]
    assert not run_load(StubServer(leaks=True), *arguments, rest_s=0.0)
    assert "leaked: loraserve_sequences_running" in capsys.readouterr().out


def test_answering_a_malformed_request_fails_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert not run_load(StubServer(accepts_all=True), "--requests", "40", "--fault-share", "0.5")
    assert "was answered with 200" in capsys.readouterr().out


def test_a_stream_without_its_end_mark_fails_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert not run_load(StubServer(ends_early=True), "--requests", "5", "--fault-share", "0")
    assert "without its end mark" in capsys.readouterr().out


@pytest.mark.parametrize(("stalls", "passes"), [(3, True), (4, False), (None, False)])
def test_an_event_loop_that_is_late_too_often_fails_the_run(stalls: int | None, passes: bool) -> None:
    stub = StubServer(stalls=stalls)
    assert run_load(stub, "--requests", "5", "--fault-share", "0", "--most-stalls", "3") == passes


class Original(LoadGenerator):
    """Clients of a server whose embedded adapters give `says` alone."""

    def __init__(self, says: str) -> None:
        self.says = says
        self.asked: list[str] = []

    async def send(self, planned: PlannedRequest, request: HttpRequest) -> RequestOutcome:
        self.asked.append(json.loads(request.body)["model"])
        return RequestOutcome(planned, RequestEnd.WRONG, 0.0, 0.0, request=request, text=self.says)


@pytest.mark.parametrize(("alone", "end"), [("abd", RequestEnd.MISTAKEN), ("abc", RequestEnd.WRONG)])
def test_a_wrong_answer_is_the_models_mistake_if_its_original_gives_it_alone(
    alone: str, end: RequestEnd
) -> None:
    planned = PlannedRequest(0.0, "sort-0017", 4, 4)
    request = HttpRequest("/v1/chat/completions", b'{"model": "sort-0017"}', "abc")
    wrong = RequestOutcome(planned, RequestEnd.WRONG, 0.0, 0.0, request=request, text="abd")
    right = RequestOutcome(planned, RequestEnd.OK, 0.0, 0.0, request=request, text="abc")
    original = Original(alone)
    assert [each.end for each in asyncio.run(original.ask_again([wrong, right]))] == [end, RequestEnd.OK]
    assert original.asked == ["sort"]


def test_no_request_is_sent_after_the_duration() -> None:
    stub = StubServer()
    assert not run_load(stub, "--requests", "50", "--duration", "0")
    assert stub.seen == 0


def test_a_trace_sets_the_number_and_the_lengths_of_requests(tmp_path: Path) -> None:
    trace, out = tmp_path / "trace.csv", tmp_path / "rows.jsonl"
    stamp = "2023-11-16 18:17:03.979960"
    trace.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{stamp}0,100,10\n{stamp}1,500,11\n")
    arguments = ["--trace", str(trace), "--fault-share", "0", "--out", str(out)]
    assert run_load(StubServer(), *arguments)
    total = json.loads(out.read_text().splitlines()[-1])
    assert total["requests"] == total["ok"] == 2
    assert total["output_tokens"] == 5 + 5  # 10 and 11, shrunk to a context of 256


def test_a_traces_gaps_are_stretched_and_the_first_requests_are_taken(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    stamps = ("2023-11-16 18:59:59.9000000", "2023-11-16 19:00:01.4000009", "2023-11-16 19:00:09.0000000")
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(f"{each},30,4\n" for each in stamps)
    )
    options = bench_serving.parse(["--trace", str(trace), "--time-scale", "2", "--requests", "2"])
    models = parse_models({"data": [{"id": BASE, "parent": None, "max_model_len": 256}]})
    planned = list(bench_serving.draw_requests(options, models))
    assert [one.at_s for one in planned] == [0.0, 3.0]
    assert {(one.prompt_tokens, one.output_tokens) for one in planned} == {(30, 4)}


def test_metrics_are_read_with_their_labels_and_comments_are_not() -> None:
    text = '# TYPE a gauge\na{x="1",y="b c"} 2.5\nb 1e+03\n'
    assert parse_metrics(text) == {'a{x="1",y="b c"}': 2.5, "b": 1000.0}


def test_a_server_that_does_not_count_cannot_be_cleared() -> None:
    with pytest.raises(ServerFailed, match="loraserve_sequences_waiting"):
        leftovers({"loraserve_sequences_running": 0.0})


def test_models_are_told_apart_by_their_parent_and_ranks_read_from_their_folders(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"r": 8, "rank_pattern": {"o_proj": 24}}')
    models = parse_models(
        {
            "data": [
                {"id": "m", "parent": None, "max_model_len": 99},
                {"id": "near", "parent": "m", "root": str(tmp_path)},
                {"id": "far", "parent": "m", "root": "/nowhere"},
            ]
        }
    )
    assert (models.base, models.adapters, models.max_model_len) == ("m", ("near", "far"), 99)
    assert models.ranks == {"near": 24}
    assert read_rank(tmp_path / "none") is None
