"""Spans of a cluster reach a collector: from the client's own span to the router, the node and the engine."""

import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from engine.rpc.wire import inference_pb2
from tests.e2e.test_cluster import free_port

pytest.importorskip("opentelemetry.sdk", reason="opentelemetry is not installed (extra `otel`)")
messages = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
services = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc")
BOUND_S = 60.0
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@dataclass(frozen=True)
class Span:
    """A span as the collector got it."""

    name: str
    role: str
    id: str
    above: str
    trace: str
    begun_ns: int
    ended_ns: int
    attributes: dict[str, Any]


class Collector(services.TraceServiceServicer):
    """Receives spans by OTLP over gRPC."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self._lock = threading.Lock()
        self._server = grpc.server(ThreadPoolExecutor(2))
        services.add_TraceServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - the protocol's name
        for resource in request.resource_spans:
            (role,) = [
                each.value.string_value
                for each in resource.resource.attributes
                if each.key == "loraserve.role"
            ]
            for scope in resource.scope_spans:
                with self._lock:
                    self.spans += [_span(each, role) for each in scope.spans]
        return messages.ExportTraceServiceResponse()

    def of(self, trace: str) -> list[Span]:
        """Return the spans of a trace."""
        with self._lock:
            return [span for span in self.spans if span.trace == trace]

    def until(self, trace: str, count: int) -> dict[str, Span]:
        """Wait for so many spans of a trace; return them by name."""
        deadline_s = time.monotonic() + BOUND_S
        while len(self.of(trace)) < count:
            assert time.monotonic() < deadline_s, self.spans
            time.sleep(0.05)
        return {span.name: span for span in self.of(trace)}

    def close(self) -> None:
        """Stop to receive."""
        self._server.stop(None).wait()


def _span(told: Any, role: str) -> Span:
    return Span(
        told.name, role, told.span_id.hex(), told.parent_span_id.hex(), told.trace_id.hex(),
        told.start_time_unix_nano, told.end_time_unix_nano,
        {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in told.attributes},
    )  # fmt: skip


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


@pytest.fixture(scope="module", params=["single", "cluster"])
def server(
    request: pytest.FixtureRequest, collector: Collector, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, int, int]]:
    """A server alone, or a router with a node: which of the two, and its ports of HTTP and gRPC."""
    port, rpc_port, log = free_port(), free_port(), (tmp_path_factory.mktemp("traces") / "log").open("wb")
    nodes = ("--nodes", "1", "--slo-ttft-s", "60", "--slo-tbt-s", "20") if request.param == "cluster" else ()
    environment = os.environ | {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.port}",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "engine.serve", "--port", str(port), "--no-progress", "--drain-s", "5"),
            *("--kv-cache-bytes", "32MiB", "--grpc-port", str(rpc_port), *nodes),
        ],
        stdout=log, stderr=log, env=environment,
    )  # fmt: skip
    deadline_s = time.monotonic() + BOUND_S
    try:
        while True:
            try:
                if ask(port, "/health")["status"] == "ok" and len(ask(port, "/v1/models")["data"]) > 8:
                    break
            except (urllib.error.URLError, ConnectionError):
                pass
            assert process.poll() is None, Path(log.name).read_text()
            assert time.monotonic() < deadline_s, Path(log.name).read_text()
            time.sleep(0.1)
        yield request.param, port, rpc_port
    finally:
        process.terminate()
        assert process.wait(60) == 0
        log.close()


def ask(port: int, path: str, body: dict[str, object] | None = None, **headers: str) -> Any:
    """Return a response's JSON."""
    data = None if body is None else json.dumps(body).encode()
    told = {"Content-Type": "application/json"} | headers
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, told)
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.loads(response.read())


def complete(port: int, trace: str, flags: str) -> None:
    body: dict[str, object] = {"model": "reverse", "prompt": "garden", "max_tokens": 8, "ignore_eos": True}
    ask(port, "/v1/completions", body, traceparent=f"00-{trace}-{CALLER}-{flags}")


def test_a_request_s_spans_hang_together_from_the_client_to_the_engine(
    server: tuple[str, int, int], collector: Collector
) -> None:
    kind, port, _ = server
    trace = TRACE if kind == "single" else TRACE[::-1]
    complete(port, trace, "01")
    engine = ["queue", "prefill", "decode"]
    spans = collector.until(trace, 4 if kind == "single" else 6)
    entry = spans["POST /v1/completions"]
    above = entry if kind == "single" else spans["forward"]
    assert entry.above == CALLER
    assert {spans[name].above for name in engine} == {above.id}
    assert {spans[name].role for name in engine} == {"single" if kind == "single" else "node"}
    if kind == "cluster":
        assert (entry.role, spans["forward"].above, spans["route"].above) == ("router", entry.id, entry.id)
        assert spans["route"].attributes == {"loraserve.node": "node-0"}
    moments = [each for name in engine for each in (spans[name].begun_ns, spans[name].ended_ns)]
    assert moments == sorted(moments)
    assert entry.begun_ns <= moments[0]
    assert spans["decode"].attributes["loraserve.adapter"] == "reverse"
    assert spans["decode"].attributes["gen_ai.usage.output_tokens"] == 8
    assert entry.attributes["http.response.status_code"] == 200


def test_a_call_of_grpc_is_traced_as_a_request_of_http_is(
    server: tuple[str, int, int], collector: Collector
) -> None:
    kind, _, rpc_port = server
    trace = ("2" if kind == "single" else "3") * 32
    ask = inference_pb2.GenerateRequest(text="garden", lora_name="reverse")
    with grpc.insecure_channel(f"127.0.0.1:{rpc_port}") as channel:
        call = channel.unary_unary(
            "/vllm.Inference/Generate", inference_pb2.GenerateRequest.SerializeToString,
            inference_pb2.GenerateResponse.FromString,
        )  # fmt: skip
        call(ask, timeout=30, metadata=(("traceparent", f"00-{trace}-{CALLER}-01"),))
    spans = collector.until(trace, 4 if kind == "single" else 6)
    entry = spans["gRPC /vllm.Inference/Generate"]
    assert entry.above == CALLER
    assert spans["decode"].above == (entry if kind == "single" else spans["forward"]).id


def test_what_nobody_wants_to_see_and_what_is_malformed_disturbs_nothing(
    server: tuple[str, int, int], collector: Collector
) -> None:
    _, port, _ = server
    unseen = "1" * 32
    complete(port, unseen, "00")
    before = len(collector.spans)
    body: dict[str, object] = {"model": "nobody", "prompt": "x", "max_tokens": 1}
    with pytest.raises(urllib.error.HTTPError, match="404"):
        ask(port, "/v1/completions", body, traceparent="nonsense")
    deadline_s = time.monotonic() + BOUND_S
    while len(collector.spans) == before:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    assert collector.of(unseen) == []
    assert collector.spans[-1].above == "", "it begins a trace of its own"
    assert not [span for span in collector.spans if "health" in span.name]
