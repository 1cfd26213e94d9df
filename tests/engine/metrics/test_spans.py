"""Where a request's time went: spans at a node and at a router, and none where nobody asks for them."""

import subprocess
import sys
import time
from collections.abc import Mapping

import pytest

from engine.cluster.router.forwarding_account import ForwardingSpans
from engine.config.command_line import serve_config
from engine.errors import InvalidConfig
from engine.live.request_spans import RequestSpans
from engine.metrics.request_log import RequestLog, RequestRecord
from engine.metrics.tracing import tracing_of
from lora.adapter import BASE
from scheduler.plan import FinishReason, SequenceKey, Slice, StepPlan, TokenEvent
from scheduler.request import Request, SamplingParams

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class FakeSpan:
    def __init__(self, name: str, above: str) -> None:
        self.name, self.above, self.trace = name, above, f"below {name}"
        self.attributes: Mapping[str, object] = {}
        self.error: str | None = None
        self.ended = False

    def end(self, attributes: Mapping[str, object], error: str | None = None) -> None:
        assert not self.ended
        self.attributes, self.error, self.ended = attributes, error, True


class FakeTracing:
    """Keeps what a Tracing would send."""

    def __init__(self) -> None:
        self.added: list[tuple[str, str, int, int, Mapping[str, object]]] = []
        self.begun: list[FakeSpan] = []

    def begin_server(self, name: str, headers: Mapping[str, str]) -> FakeSpan:
        return self.begin(name, headers.get("traceparent", ""))

    def begin(self, name: str, trace: str) -> FakeSpan:
        self.begun.append(FakeSpan(name, trace))
        return self.begun[-1]

    def add(
        self, name: str, trace: str, begun_ns: int, ended_ns: int, attributes: Mapping[str, object]
    ) -> None:
        self.added.append((name, trace, begun_ns, ended_ns, attributes))


def request(name: str = "a", trace: str = PARENT, n: int = 1) -> Request:
    return Request(name, (1, 2, 3), BASE, SamplingParams(n=n, seed=1), (0,), time.monotonic(), trace=trace)


def plan(*requests: Request) -> StepPlan:
    return StepPlan(
        tuple(Slice(SequenceKey(r.request_id, 0), r, (1,), 0, (), True, 0, (), False) for r in requests)
    )


def token(name: str, index: int = 0, end: FinishReason | None = None) -> TokenEvent:
    return TokenEvent(SequenceKey(name, index), 7, finish_reason=end, cached_tokens=2)


def test_an_engine_tells_of_waiting_of_the_prompt_and_of_tokens_one_after_the_other() -> None:
    tracing = FakeTracing()
    spans = RequestSpans(tracing)
    spans.begin(asked := request())
    spans.ran(plan(asked), 0.0)
    spans.ran(plan(asked), 0.0)
    spans.heard([token("a")])
    assert tracing.added == []
    spans.heard([token("a", end=FinishReason.LENGTH)])
    assert [(name, trace) for name, trace, *_ in tracing.added] == [
        ("queue", PARENT),
        ("prefill", PARENT),
        ("decode", PARENT),
    ]
    moments = [each for _, _, begun, ended, _ in tracing.added for each in (begun, ended)]
    assert moments == sorted(moments)
    assert moments[1] == moments[2]
    assert moments[3] == moments[4]
    told = tracing.added[0][4]
    assert (told["gen_ai.usage.input_tokens"], told["gen_ai.usage.output_tokens"]) == (3, 2)
    assert (told["loraserve.cached_tokens"], told["loraserve.outcome"]) == (2, "done")


def test_a_request_of_several_sequences_ends_with_the_last_of_them() -> None:
    tracing = FakeTracing()
    spans = RequestSpans(tracing)
    spans.begin(request(n=2))
    spans.heard([token("a", 0, FinishReason.STOP)])
    assert tracing.added == []
    spans.finished("a", 1)
    spans.ended("a", "abort")
    assert [name for name, *_ in tracing.added] == ["queue", "decode"]


def test_a_request_that_never_ran_has_only_waited() -> None:
    tracing = FakeTracing()
    spans = RequestSpans(tracing)
    spans.begin(request())
    spans.ended("a", "abort")
    ((name, _, _, _, told),) = tracing.added
    assert (name, told["loraserve.outcome"]) == ("queue", "abort")


def test_requests_that_nobody_traces_leave_nothing() -> None:
    tracing = FakeTracing()
    for spans in (RequestSpans(tracing), RequestSpans()):
        spans.begin(asked := request(trace=""))
        spans.ran(plan(asked), 0.0)
        spans.heard([token("a", end=FinishReason.STOP)])
        spans.ended("a", "done")
    forwarding = ForwardingSpans(tracing)
    assert forwarding.sent(asked, "n0") == ForwardingSpans().sent(request(), "n0") == ""
    forwarding.ended("a", "done")
    assert (tracing.added, tracing.begun) == ([], [])


def test_a_router_tells_of_each_node_that_a_request_was_sent_to() -> None:
    tracing = FakeTracing()
    spans = ForwardingSpans(tracing)
    asked = request()
    assert spans.sent(asked, "n0") == "below forward", "the node's spans are below it"
    spans.left("a", "lost")
    spans.sent(asked, "n1")
    spans.ended("a", "done")
    spans.ended("a", "abort")
    assert [(name, told) for name, _, _, _, told in tracing.added] == [
        ("route", {"loraserve.node": "n0"}),
        ("route", {"loraserve.node": "n1"}),
    ]
    assert tracing.added[1][2] >= tracing.added[0][3], "the second wait begins where the first attempt ended"
    assert [(each.above, each.error, each.ended) for each in tracing.begun] == [
        (PARENT, "lost", True),
        (PARENT, None, True),
    ]


def test_a_client_s_span_is_above_and_a_failure_of_the_server_is_one() -> None:
    tracing = FakeTracing()
    log = RequestLog(tracing=tracing)
    for status, code, expected in ((200, None, None), (404, "unknown", None), (503, "stopped", "stopped")):
        record = RequestRecord("id", "127.0.0.1", "POST", "/v1/completions")
        log.begin(record, {"traceparent": PARENT})
        assert record.trace == "below POST /v1/completions"
        record.status, record.code, record.model = status, code, "m" * 1000
        log.write_access(record)
        span = tracing.begun[-1]
        assert (span.above, span.error) == (PARENT, expected)
        assert span.attributes["http.response.status_code"] == status
        assert span.attributes["loraserve.model"] == "m" * 200
    log.close()


def test_without_a_collector_there_is_no_tracing_and_the_library_is_not_imported() -> None:
    assert tracing_of(serve_config([], {})) is None
    shown = "import engine.serve, sys; print([name for name in sys.modules if 'opentelemetry' in name])"
    ran = subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "environ"),
    [(["--otlp-endpoint", "http://a:4317"], {}), ([], {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:4317"})],
)
def test_a_collector_without_the_library_is_refused_with_the_remedy(
    arguments: list[str], environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(InvalidConfig, match=r"^otlp_endpoint='http://a:4317' .*scripts/setup otel"):
        tracing_of(serve_config(arguments, environ))


@pytest.mark.parametrize(
    "url", ["collector:4317", "grpc://a:1", "http://a", "http://u:p@a:1", "http://a:1/x"]
)
def test_a_collector_s_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(InvalidConfig, match=r"^otlp_endpoint=.*http://collector.example:4317"):
        serve_config(["--otlp-endpoint", url], {})
