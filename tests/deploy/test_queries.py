"""Alerts and the dashboard ask for series that a server exports, under labels that these have."""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import promql_parser
import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.batches.batch_census import BatchCensus
from engine.catalogue.base import ClusterRecord, NodeRecord, SizeRecord
from engine.cluster.roles.coordinator_series import coordinator_series
from engine.config.command_line import serve_config
from engine.errors import NotInTime
from engine.metrics.snapshot import Standing
from engine.metrics.telemetry import Telemetry
from scheduler.cluster.routing.orders import RefusalReason
from tests.deploy.kustomize import KUBERNETES, Manifest, container, manifests, render
from tests.engine.metrics.test_series import router as cluster_router
from tests.fakes.engine_client import FakeClient

ROOT = Path(__file__).parents[2]
MONITORING = KUBERNETES / "components" / "monitoring"
OF_TARGETS = {"job", "pod", "namespace", "instance"}
"""Labels that Prometheus adds to what it scrapes."""

OF_ROUTERS = (
    "requests_", "prompt_tokens", "output_tokens", "time_", "tenant_", "cluster_", "streams_", "replacements", "batch",
)  # fmt: skip
"""How series begin that tell of requests or of the cluster: in a cluster routers have them, nodes do not."""

Labels = dict[str, set[str]]


def rules() -> list[dict[str, Any]]:
    (alerts,) = manifests(MONITORING / "alerts.yaml")
    return [rule for group in alerts["spec"]["groups"] for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    return json.loads((ROOT / "deploy" / "grafana" / "loraserve.json").read_text())


def panels() -> list[tuple[str, str]]:
    """Each query of the dashboard, with its panel's title, and what Grafana would put into it."""
    return [
        (panel["title"], target["expr"].replace("$__rate_interval", "5m").replace("$namespace", "loraserve"))
        for panel in dashboard()["panels"]
        for target in panel["targets"]
    ]


QUERIES = [(rule["alert"], rule["expr"]) for rule in rules()] + panels()


@pytest.fixture(scope="module")
def exported() -> dict[str, Labels]:
    """The series of all servers by name: their labels, and which values these have."""
    return series_of_engines() | series_of_coordinators()


@cache
def series_of_coordinators() -> dict[str, Labels]:
    """The series of a coordinator."""
    node = NodeRecord(
        "n1", "serving", load=0.5, slowdown=1.0, memory_bytes=2, used_bytes=1, held=1, cached=1, arriving=1
    )
    cluster = ClusterRecord(1, 1, 1, [node], replacements=1, size=SizeRecord(1, 1, 0.0, "start", 1, 2))
    return read(Telemetry().render(Standing(), coordinator_series(cluster)))


@cache
def series_of_engines() -> dict[str, Labels]:
    """The series of nodes and routers."""
    client = cluster_router(adapters=1)
    telemetry, counts = client.telemetry, client.forwarding.counts
    telemetry.watch_lost_lines(lambda: {"access": 0})
    telemetry.started("a")
    telemetry.first_token("a", 0.1)
    telemetry.next_token("a", 0.1)
    for reason in ("stop", "length", "abort", "error"):
        telemetry.finished("a", reason, 1, 1)
    telemetry.tenants.finished("t", "refused", 0, 0)
    counts.sent_to["n1"] = 1
    counts.refused |= {each.value: 1 for each in RefusalReason}
    with suppress(NotInTime), telemetry.refusals.counted():
        raise NotInTime("late", 1)
    batches = BatchCensus().series(lambda batch: batch)
    return read(telemetry.render(FakeClient(client.tokenizer).stats(), (*client.series(), *batches)))


def read(text: bytes) -> dict[str, Labels]:
    """The series of a scrape by name."""
    found: dict[str, Labels] = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            labels = found.setdefault(sample.name, {})
            for label, value in sample.labels.items():
                labels.setdefault(label, set()).add(value)
    return found


def selectors(query: str) -> list[promql_parser.VectorSelector]:
    """The selectors of a query, which is refused if it is no PromQL."""
    found: list[promql_parser.VectorSelector] = []

    def visit(part: promql_parser.Expr) -> bool:
        if isinstance(part, promql_parser.VectorSelector):
            found.append(part)
        if isinstance(part, promql_parser.MatrixSelector):
            found.append(part.vector_selector)
        return True

    promql_parser.walk(promql_parser.parse(query), visit)
    assert found, f"{query}: it asks for no series"
    return found


def asked(query: str) -> Iterator[tuple[str, str, str, str]]:
    """Each matcher of a query: the series, the label, how it is compared, and with what; one at least a series."""
    for selector in selectors(query):
        assert selector.name is not None
        yield selector.name, "", "", ""
        for matcher in selector.matchers.matchers:
            yield selector.name, matcher.name, str(matcher.op), matcher.value


def mistakes(query: str, exported: dict[str, Labels]) -> list[str]:
    """What a query asks for in vain."""
    found: list[str] = []
    for name, label, op, value in asked(query):
        if name not in exported:
            found.append(f"no server exports {name}")
        elif label and label not in exported[name].keys() | OF_TARGETS:
            found.append(f"{name} has no label {label}")
        elif label in exported[name] and op in ("MatchOp.Equal", "MatchOp.Re"):
            values = value.split("|") if op == "MatchOp.Re" else [value]
            found += [f"{name} has no {label} {each}" for each in values if each not in exported[name][label]]
        elif (label, value) == ("job", "node") and name.removeprefix("loraserve_").startswith(OF_ROUTERS):
            found.append(f"nodes of a cluster have no {name}")
        elif label == "job" and name not in (
            series_of_coordinators() if value == "coordinator" else series_of_engines()
        ):
            found.append(f"{value}s have no {name}")
    known = set().union(*exported.values()) | OF_TARGETS | {"le"}
    for group in re.findall(r"\bby \(([^)]*)\)", query):
        found += [f"no series has a label {each}" for each in re.split(r",\s*", group) if each not in known]
    return found


@pytest.mark.parametrize(("where", "query"), QUERIES)
def test_a_query_asks_for_what_a_server_exports(where: str, query: str, exported: dict[str, Labels]) -> None:
    assert mistakes(query, exported) == []


@pytest.mark.parametrize(
    "query",
    [
        "loraserve_gone > 1",
        'rate(loraserve_requests_finished_total{reason="bored"}[5m])',
        'loraserve_requests_refused_total{reason=~"overloaded|bored"}',
        'loraserve_healthy{adapter="a"}',
        'loraserve_requests_started_total{job="node"}',
        'loraserve_cluster_nodes{job="node"}',
        'loraserve_node_load{job="router"}',
        'loraserve_steps_total{job="coordinator"}',
        "sum by (team) (loraserve_healthy)",
    ],
)
def test_a_query_that_asks_in_vain_is_found(query: str, exported: dict[str, Labels]) -> None:
    assert mistakes(query, exported)


def test_alerts_say_what_is_wrong_and_what_to_do() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names) > 8
    for rule in rules():
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"].keys() == {"summary", "remedy"}


def test_alerts_on_limits_are_at_the_limits_that_routers_have() -> None:
    (router,) = (each for each in render(KUBERNETES / "base") if _is_router(each))
    flags = dict(each.removeprefix("--").split("=", 1) for each in container(router)["args"])
    bounds = {rule["alert"]: re.findall(r"> ([\d.]+)$", rule["expr"]) for rule in rules()}
    limits = {alert: float(found[0]) for alert, found in bounds.items() if found}
    assert limits["LoraserveFirstTokenLate"] == float(flags["slo-ttft-s"])
    most = int(flags.get("max-waiting", serve_config([], {}).max_waiting))
    assert 0.7 * most < limits["LoraserveQueueNearlyFull"] < most


def _is_router(manifest: Manifest) -> bool:
    return (manifest["kind"], manifest["metadata"]["name"]) == ("Deployment", "loraserve-router")


def test_what_is_scraped_are_the_services_of_all_members() -> None:
    found = render(KUBERNETES / "overlays" / "gpu")
    (monitor,) = (each for each in found if each["kind"] == "ServiceMonitor")
    (endpoint,) = monitor["spec"]["endpoints"]
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    scraped = [
        each["metadata"]["labels"][monitor["spec"]["jobLabel"]]
        for each in found
        if each["kind"] == "Service"
        and wanted <= each["metadata"]["labels"].items()
        and endpoint["port"] in {port["name"] for port in each["spec"]["ports"]}
    ]
    assert sorted(scraped) == ["coordinator", "node", "router"]
    assert (endpoint["path"], endpoint["authorization"]["credentials"]) == (
        "/metrics", {"name": "loraserve-keys", "key": "metrics-key"},
    )  # fmt: skip


def test_what_the_operator_reads_has_its_form() -> None:
    found: dict[str, Manifest] = {
        each["kind"]: each
        for each in render(KUBERNETES / "overlays" / "gpu")
        if "coreos" in each["apiVersion"]
    }
    assert {kind: each["apiVersion"] for kind, each in found.items()} == dict.fromkeys(
        ("ServiceMonitor", "PrometheusRule"), "monitoring.coreos.com/v1"
    )
    assert found["ServiceMonitor"]["spec"].keys() == {"selector", "jobLabel", "endpoints"}
    for group in found["PrometheusRule"]["spec"]["groups"]:
        assert group.keys() == {"name", "rules"}
        for rule in group["rules"]:
            assert rule.keys() - {"for"} == {"alert", "expr", "labels", "annotations"}
            assert re.fullmatch(r"\d+[smh]", rule.get("for", "1m"))


def test_the_dashboards_panels_do_not_overlap_and_have_names() -> None:
    shown = dashboard()["panels"]
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in shown]
    assert (
        len(set(places)) == len({panel["title"] for panel in shown}) == len({panel["id"] for panel in shown})
    )
    assert {variable["name"] for variable in dashboard()["templating"]["list"]} == {"datasource", "namespace"}
