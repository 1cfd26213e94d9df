"""Send spans of requests to a collector by OpenTelemetry's protocol. The only module that knows opentelemetry.

The library is optional: it is imported when an operator names a collector. Without one there is no Tracing at all. A
request that nobody traces has an empty `trace`, and nothing is done for it.
"""

import os
import time
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from engine.config.config import ServeConfig
from engine.errors import InvalidConfig

_FLUSH_MS = 2000  # for the last spans, when the server ends
_EXPORT_S = 5.0
Attributes = Mapping[str, str | int | float | bool]


class LiveSpan:
    """A span that has begun. `trace` is what spans below it, here or on other nodes, name as their parent."""

    def __init__(self, span: Any, trace: str) -> None:
        """Take over a span of the library; `trace` is empty if nobody wants to see it."""
        self.trace = trace
        self._span = span

    def end(self, attributes: Attributes, error: str | None = None) -> None:
        """End it now; with `error` as a failure."""
        self._span.set_attributes(attributes)
        if error is not None:
            status = import_module("opentelemetry.trace").status
            self._span.set_status(status.Status(status.StatusCode.ERROR, error))
        self._span.end()


class Tracing:
    """Makes spans, which a thread of the library sends. What a collector does not take in time is dropped."""

    def __init__(self, exporter: Any, role: str, name: str) -> None:
        """Send spans of the member called `name` by `exporter`."""
        sdk, export = (
            import_module("opentelemetry.sdk.trace"),
            import_module("opentelemetry.sdk.trace.export"),
        )
        service = os.environ.get("OTEL_SERVICE_NAME", "loraserve")
        told = {"service.name": service, "service.instance.id": name, "loraserve.role": role}
        resource = import_module("opentelemetry.sdk.resources").Resource.create(told)
        self._provider: Any = sdk.TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(export.BatchSpanProcessor(exporter))
        self._tracer: Any = self._provider.get_tracer("loraserve")
        self._kinds: Any = import_module("opentelemetry.trace").SpanKind
        propagation = import_module("opentelemetry.trace.propagation.tracecontext")
        self._context: Any = propagation.TraceContextTextMapPropagator()

    def begin_server(self, name: str, headers: Mapping[str, str]) -> LiveSpan:
        """Begin the span of a client's request, below the one that its `traceparent` names, if it has one."""
        return self._begin(name, {key: headers[key] for key in ("traceparent",) if key in headers}, "SERVER")

    def begin(self, name: str, trace: str) -> LiveSpan:
        """Begin a span below `trace`, whose work another node does."""
        return self._begin(name, {"traceparent": trace}, "CLIENT")

    def add(self, name: str, trace: str, begun_ns: int, ended_ns: int, attributes: Attributes) -> None:
        """Add a span below `trace` that has ended already; times are since 1970."""
        parent = self._context.extract({"traceparent": trace})
        span = self._tracer.start_span(name, parent, attributes=dict(attributes), start_time=begun_ns)
        span.end(ended_ns)

    def close(self) -> None:
        """Send what waits, for a moment at most."""
        self._provider.force_flush(_FLUSH_MS)
        self._provider.shutdown()

    def _begin(self, name: str, carrier: Mapping[str, str], kind: str) -> LiveSpan:
        span = self._tracer.start_span(
            name, self._context.extract(carrier), self._kinds[kind], start_time=time.time_ns()
        )
        told: dict[str, str] = {}
        if span.is_recording():
            self._context.inject(told, import_module("opentelemetry.trace").set_span_in_context(span))
        return LiveSpan(span, told.get("traceparent", ""))


def tracing_of(config: ServeConfig) -> Tracing | None:
    """Return what sends spans to the collector that `config` names, if it names one. Raises InvalidConfig."""
    endpoint = config.otlp_endpoint
    if endpoint is None:
        return None
    try:
        otlp = import_module("opentelemetry.exporter.otlp.proto.grpc.trace_exporter")
        exporter = otlp.OTLPSpanExporter(endpoint, timeout=_EXPORT_S)
    except ImportError as error:
        remedy = "the library opentelemetry is not installed: run scripts/setup otel, or leave it out"
        raise InvalidConfig("otlp_endpoint", endpoint, remedy) from error
    return Tracing(exporter, config.cluster.role, config.cluster.node_name or config.cluster.role)
